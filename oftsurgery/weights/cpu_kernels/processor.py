"""What the processor can do that the kernels are compiled for: this one, or the one that numba's variables name."""

from __future__ import annotations

import os
from typing import Any

import llvmlite.binding as llvm

#: the processor's name, and its features as LLVM writes them
NAME = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
FEATURES = os.environ.get("NUMBA_CPU_FEATURES") or ("" if NAME == "generic" else llvm.get_host_cpu_features().flatten())

_HAS = set(FEATURES.split(","))
AVX512 = "+avx512f" in _HAS
#: whether one instruction clamps to ±1
HAS_RANGE = "+avx512dq" in _HAS
#: whether it converts float16; without that LLVM would call a routine which is not linked in
HAS_F16 = AVX512 or "+f16c" in _HAS or llvm.get_default_triple().startswith(("aarch64", "arm64"))


def target() -> Any:
    """LLVM's target machine for code of this process on this processor. An engine of LLVM takes its target machine over."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    relocation = "static" if llvm.Target.from_default_triple().name.startswith("x86") else "default"
    triple = llvm.Target.from_triple(llvm.get_process_triple())
    return triple.create_target_machine(
        cpu=NAME, features=FEATURES, opt=3, reloc=relocation, codemodel="jitdefault", jit=True
    )
