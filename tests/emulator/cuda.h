#include "hopper_host.h" // stands in for the toolkit's header of this name
