"""jaxmllm: multimodal language models whose visual path is a choice in a config.

    image -> encoder taps -> fuser -> aggregator -> language model -> objectives

    config.py    the fields of a config        recipes.py       configs: files, overrides
    batch.py     structs that the parts exchange   errors.py    what is wrong with a request
    mllm.py      the whole model on one page   mesh.py          mesh axes and sharding rules
    sharded.py   operations on split arrays    host_batches.py  numpy batches -> arrays on all devices
    processes.py joins processes, sets malloc  watched.py       what a crashed process was doing
    bench.py     times real steps              dry_run.py       what a run would do
    documents.py configs as JSON, and back     fields.py        whether values fit fields
    json_text.py JSON of others, bounded       json_lines.py    JSON Lines that survive a crash
    data/        disk -> Batch                 encoders/        picture -> taps
    fusers/      taps -> one map               aggregators/     maps -> visual tokens
    llms/        tokens -> hidden states       objectives/      hidden states -> losses
    nn/          layers that the parts share   train/           batches -> next state
    weights/     Hugging Face in and out       eval/            a trained state -> answers and scores
    plan/        a config on a TPU slice       scenes/          a data set of composed sprites
    report/      a run or data set as a page   serve/           an endpoint for OpenAI's clients
    cli/         the command line
    jax_internals.py what is read of JAX's jaxprs

The parts of the model (data/ to objectives/) never import one another; only mllm.py joins them. Neither train/ nor
nn/ imports a part.
"""
