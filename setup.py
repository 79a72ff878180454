"""Build the native kernels, if g++ is installed; everything else is in setup.cfg."""

import platform
import sys

from setuptools import Extension, setup

# Not linked with an OpenMP runtime: the kernels use the one of torch, whose threads are already running.
kernels = Extension(
    "parameternet.layers.native._kernels",
    ["parameternet/layers/native/kernels.cpp"],
    depends=["parameternet/layers/native/kernels.inc"],
    extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-g0", "-w"],
    extra_link_args=["-s"],
    language="c++",
    optional=True,  # without a compiler, torch's operators are used
)
supported = sys.platform == "linux" and platform.machine() == "x86_64"
setup(ext_modules=[kernels] if supported else [])
