# SPDX-License-Identifier: Apache-2.0
"""Writes the tables under kernels/tuned.

usage: python benches/tune.py {layers,networks,wide,measure,launches,host,cpu} [--help] [options of that tuner]

    layers, networks, wide    tiles of GPU kernels, picked by compiling them; no GPU is needed
    measure                   which wide layers the TMA kernel computes faster than the library, timed on a GPU
    launches                  from how many bytes on eager calls of our kernels beat torch's, timed on a GPU
    host                      what eager calls ask of the host, on a driver that does nothing; writes no table
    cpu                       from which sizes each of torch's CPU products is taken, timed on this CPU
"""

import argparse
import importlib

MODULES = {name: name for name in ("layers", "networks", "wide", "launches", "host", "cpu")} | {"measure": "measured"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuner", choices=MODULES)
    parser.add_argument("options", nargs=argparse.REMAINDER)
    chosen = parser.parse_args(arguments)
    # Imported when it is chosen: the CPU's has to bind threads before torch is there, and not all need triton.
    importlib.import_module(f"tuning.{MODULES[chosen.tuner]}").main(chosen.options)


if __name__ == "__main__":
    main()
