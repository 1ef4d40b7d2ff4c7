"""`baleen eval`: clients that measure the answers of any OpenAI-compatible server. No torch, no engine.

To add a task: give its problems (`problems.py`, or a generator as `needle.py`) and a rule in `scoring.RULES`.
"""
