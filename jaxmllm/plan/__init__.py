"""Planning: compile a recipe's train step for a TPU slice nobody holds; memory, cycles, traffic, predicted MFU.

chips.py    what the hardware can do            compile.py  recipe -> compiled program of a topology
hlo.py      text of a program -> instructions   price.py    instructions -> cycles by stage
traffic.py  collectives -> bytes and seconds    flops.py    what the model needs, from its jaxpr
report.py   all of it -> one dict, printed
"""
