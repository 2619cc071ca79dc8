# SPDX-License-Identifier: Apache-2.0
"""Policies: from what is known of a step to the level of the ladder that it runs at.

A policy computes with the arrays (`arrays.py`) of one state, of fixed shape and without branches on
their values: on a GPU it runs beside the model and needs no host read, and replay is the same code.
"""
