"""Builds the native CPU kernels; everything else about the package is in pyproject.toml.

``optional``: without a C++ compiler the package installs all the same and runs on the torch reference.
"""

from glob import glob

from setuptools import Extension, setup

FOLDER = "tokenrelay/model/transformer/kernels/cpp"

setup(
    ext_modules=[
        Extension(
            "tokenrelay.model.transformer.kernels._native",
            sources=sorted(glob(f"{FOLDER}/*.cpp")),
            depends=sorted(glob(f"{FOLDER}/*.h") + glob(f"{FOLDER}/*.inl")),
            language="c++",
            extra_compile_args=[
                *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden"),
                # No contraction: every fma is written out, so the bits are the same on every machine.
                *("-ffp-contract=off", "-fno-math-errno"),
                # False alarms inside GCC 12's own AVX-512 headers.
                *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"),
            ],
            extra_link_args=["-lpthread"],
            optional=True,
        )
    ]
)
