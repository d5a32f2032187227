"""jaxmllm: multimodal language models whose visual path is a choice in a config.

    image -> encoder taps -> fuser -> aggregator -> language model -> objectives

    main.py      the command line              config.py   the vocabulary of a recipe
    batch.py     structs between the stages    mllm.py     the whole model on one page
    mesh.py      axes and sharding rules    bench.py     real steps, timed
    data/        disk -> Batch                 encoders/   picture -> taps
    fusers/      taps -> one map               aggregators/  maps -> visual tokens
    llms/        tokens -> hidden states       objectives/ hidden states -> losses
    nn/          parts the stages share        train/      batches -> next state
    weights/     Hugging Face in and out       eval/       a trained state -> answers and numbers
    plan/        a recipe on a TPU slice nobody holds: memory, cycles, traffic

Stages never import one another; only mllm.py joins them. train/ imports no stage, nn/ neither.
"""
