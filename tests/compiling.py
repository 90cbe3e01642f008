"""What the compile-only tests share: cases compiled ahead of time in all cores, and the table that they print."""

import multiprocessing
import os
from pathlib import Path

OPCODES = ("HGMMA", "HMMA", "FFMA", "MUFU")


def compile_selected(request, cases, compile):
    """name -> the Resources that compile(case) lists, for the cases that selected tests name.

    Prints a row per launch, and writes the cubins into the folder that --cubins names.
    """
    selected = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    names = [name for name in cases if name in selected]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        table = dict(zip(names, pool.map(compile, [cases[name] for name in names], chunksize=1), strict=True))
    if option := request.config.getoption("--cubins"):
        folder = Path(option)
        folder.mkdir(parents=True, exist_ok=True)
        for name, results in table.items():
            for index, resources in enumerate(results):
                (folder / f"{name}.{index}.cubin").write_bytes(resources.cubin)
    print("\n" + f"{'kernel':64}" + "".join(f"{head:>7}" for head in ("regs", "stack", "smem", "warps", *OPCODES)))
    for name, results in table.items():
        for own in results:
            cells = (own.registers, own.stack, own.shared, own.num_warps, *map(own.opcodes.get, OPCODES))
            print(f"{name:64}" + "".join(f"{cell or 0:7}" for cell in cells))
    return table
