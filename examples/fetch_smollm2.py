"""Fetches SmolLM2-135M-Instruct as a Hugging Face folder: ``python examples/fetch_smollm2.py --out DIR``."""

import argparse
import sys

from sparsekit.integrations.gguf import fetch_smollm2


def show(what: str, done: int, total: int) -> None:
    print(f"\r\033[K{done}/{total} {what}", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="a new or empty folder")
    out = parser.parse_args().out
    try:
        folder = fetch_smollm2(out, progress=show if sys.stderr.isatty() else None)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(str(error))
    print(folder)


if __name__ == "__main__":
    main()
