"""Planning: compiles a recipe's train step for a TPU slice that need not be at hand; memory, cycles, traffic, MFU.

chips.py     what each TPU chip can do             compile.py   a recipe -> the compiled program for a topology
hlo.py       text of a program -> instructions     price.py     an instruction -> cycles
kernels.py   cycles of hand-written kernels        traffic.py   a collective -> bytes and seconds
timeline.py  all charges of a program, in order    flops.py     FLOPs that the model needs, from its jaxpr
report.py    all of it -> one dict, and its text
"""
