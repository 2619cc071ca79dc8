# SPDX-License-Identifier: Apache-2.0
"""The requests of the demo: talk, code and prose."""

CHAT = (
    "What should I think about before I move to a new city? Give me a detailed answer.",
    "Explain to a ten-year-old why the sky is blue and sunsets are red.",
    "Plan a week of simple dinners for two people who do not eat meat.",
    "How does a vaccine protect the body? Explain it step by step.",
)
CODE = (
    "Write a Python function that merges two sorted lists, and explain how it works.",
    "Write a SQL query that lists the ten customers who spent most last year, with comments.",
    "Show how to read a CSV file in Python and print the mean of every column.",
    "Write a bash script that renames all .jpeg files of a folder to .jpg, line by line.",
)
PROSE = (
    "Tell a story of a lighthouse keeper who finds a message in a bottle.",
    "Describe an old market on a rainy morning, in long sentences.",
    "Write the first page of a novel that is set on a night train.",
    "Write a letter from a grandmother to her grandson who is at sea.",
)
PROMPTS = tuple(prompt for kinds in zip(CHAT, CODE, PROSE, strict=True) for prompt in kinds)
"""The three kinds in turn; the first is the one whose answer is streamed."""
