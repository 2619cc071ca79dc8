# SPDX-License-Identifier: Apache-2.0
"""Native CPU kernels: C++ sources and the code that builds, caches and loads them."""
