# SPDX-License-Identifier: Apache-2.0
"""Policies: from what is known of a step to the level of the ladder that it runs at.

A policy is a pure function over arrays (`arrays.py`) of fixed shape, without branches on their
values: on a GPU it runs beside the model and needs no host read, and replay is the same code.
"""
