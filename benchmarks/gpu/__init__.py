"""What the GPU scripts beside this folder are made of.

stages.py   one process for each part, with a time limit; what it found as lines of JSON
tests.py    the tests marked gpu in parallel processes; shard.py, the pytest plugin that records them
shapes.py   every op in the released model's shapes, against its reference, with times
speed.py    `baleen bench batch` on the two configs, beside targets, a peer's figures and floors
serving.py  the engine's own loop: how long the GPU has nothing to do; start to ready
answers.py  the bundled model's greedy answers against those of its CPU run
wire.py     stands in for zmq where that is not installed: the engine's socket without a network
"""
