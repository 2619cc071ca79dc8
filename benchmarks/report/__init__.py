# SPDX-License-Identifier: Apache-2.0
"""The page that is made of the results of one machine, and the tables of the README."""
