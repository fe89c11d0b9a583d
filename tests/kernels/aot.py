"""Compiles Triton kernels for GPUs that need not be there, many in one process.

That process is another one: where kernels run in Triton's interpreter, they cannot be compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90, 100)

Job = dict[str, Any]


def job(
    kernel: str,
    warps: int,
    *,
    stages: int | None = None,
    registers: int | None = None,
    pointer: str = "*bf16",
    types: dict[str, str] | None = None,
    **constants,
) -> Job:
    """`kernel` is "module:name". Its arguments are constants, as named here, or have a type: of `types`, or `pointer`."""
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    options = {name: value for name, value in options.items() if value is not None}
    return {"kernel": kernel, "options": options, "pointer": pointer, "types": types or {}, "constants": constants}


def compile_ahead(*jobs: Job, capabilities: tuple[int, ...] = CAPABILITIES) -> list[dict[str, Any]]:
    """For each job and capability: kernel, capability, size of the binary, shared memory, number of layout conversions,
    registers of a thread and bytes of its stack, where they are spilled to; of Gluon kernels also of waits for a tensor core
    product (one after each if ptxas serialised them) and of spills."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.aot"]
    work = json.dumps({"jobs": jobs, "capabilities": capabilities})
    root = Path(__file__).parents[2]
    done = subprocess.run(command, input=work, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    names = [(one["kernel"], capability) for one in jobs for capability in capabilities]
    assert [(result["kernel"], result["capability"]) for result in results] == names
    assert all(result["bytes"] > 0 for result in results)
    return results


def _compile(one: Job, capability: int) -> dict[str, Any]:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    module, name = one["kernel"].split(":")
    kernel, constants = getattr(importlib.import_module(module), name), one["constants"]
    types = {n: "constexpr" if n in constants else one["types"].get(n, one["pointer"]) for n in kernel.arg_names}
    # What Triton finds at run time too: tensors start at multiples of 16 bytes, rows are multiples of 16 apart.
    aligned = [i for i, n in enumerate(types) if types[n].startswith("*") or n.endswith("stride")]
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=one["options"])
    assert f"sm_{capability}" in binary.asm["ptx"]
    registers, stack = _resources(binary.asm["cubin"])
    assembly = binary.asm["sass"] if kernel.is_gluon() else ""
    return {
        "kernel": one["kernel"],
        "capability": capability,
        "bytes": len(binary.asm["cubin"]),
        "shared": binary.metadata.shared,
        "layout_conversions": binary.asm["ttgir"].count("ttg.convert_layout"),
        "registers": registers,
        "stack": stack,
        "product_waits": assembly.count("WARPGROUP.DEPBAR"),
        "spills": assembly.count("STL"),
    }


def _resources(cubin: bytes) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps([_compile(one, capability) for one in asked["jobs"] for capability in asked["capabilities"]]))
