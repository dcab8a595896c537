"""How a model like tests/data/kjv1m is trained: a Llama-style model of 0.92 M parameters on one text, on a CPU.

    python examples/train_tiny.py --text TEXT [TEXT ...] --held-out examples/data/kjv.test.txt --out tiny [--steps 4000]

Give it a few megabytes of text: on the 200 kB of examples/data it learns them by heart. Prints the loss as it goes, and at the end
the perplexity on the held-out text, which it also writes to perplexity.json in the folder.
"""

import argparse
import json
import math
import os
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sparsekit
from sparsekit.checkpoint import check_new_folder
from sparsekit.data import read_tokens


def train_tokenizer(texts: list[Path], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train([str(text) for text in texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def config(vocabulary: int) -> LlamaConfig:
    """kjv1m's: 4 layers of width 128, four heads of 32 over two key-value heads, an MLP of 384, embeddings tied."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    check_new_folder(args.out)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.text, args.vocabulary)
    held_out = read_tokens(args.held_out, tokenizer)
    tokens = torch.cat([read_tokens(text, tokenizer) for text in args.text])
    model = LlamaForCausalLM(config(args.vocabulary)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = min(100, args.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
    )
    for step in track(range(args.steps), description="training"):
        starts = torch.randint(0, len(tokens) - args.seq_len, (args.batch, 1))
        ids = tokens[starts + torch.arange(args.seq_len + 1)]
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 200 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    model = model.half()
    sparsekit.save(model, args.out, format="dense", tokenizer=tokenizer)
    loaded = sparsekit.load(args.out, dtype=torch.float32)
    result = sparsekit.perplexity(loaded, held_out, args.seq_len)
    record = {"text": args.held_out.name, "seq_len": args.seq_len, **result}
    (args.out / "perplexity.json").write_text(json.dumps(record, indent=2) + os.linesep)
    print(f"perplexity {result['perplexity']:.2f} over {result['tokens']} tokens of {args.held_out}")


if __name__ == "__main__":
    main()
