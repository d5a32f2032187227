"""A model whose parts do not fit together is refused with a message of one line."""

from __future__ import annotations

import pytest

from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.aggregators.mof import AdditiveMoF, InterleavedMoF
from jaxmllm.aggregators.sva import SVA, SVALayer
from jaxmllm.fusers.concat import Concat
from jaxmllm.fusers.dense_connector import STI, dci
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.fusers.single import Single
from jaxmllm.llms.decoder import Decoder
from jaxmllm.llms.inserts import VisualInserts
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.embed_distill import EmbedDistill
from tests import visual_zoo as zoo

VIT = zoo.ENCODERS["clip"]


def mllm(fuser=None, aggregator=None, llm=None, **objectives) -> MLLM:
    fusers, aggregator = {"a": fuser or Single()}, aggregator or MLPProjector(4)
    return MLLM({"a": VIT}, fusers, aggregator, llm or zoo.DECODER, objectives)


@pytest.mark.parametrize(
    "parts, message",
    [
        (dict(fuser=Single(3)), "encoder 'a': Single: there is no tap 3 among 3"),
        (dict(fuser=Concat(((0,), (5,)))), r"encoder 'a': Concat: group \(5,\) must name some of the 3 taps"),
        (dict(fuser=dci()), r"encoder 'a': Concat: group \(23,\)"),
        (dict(fuser=STI(17)), "encoder 'a': STI needs at least two taps of at least 17 cells"),
        (dict(fuser=MMFuser(heads=3)), "encoder 'a': MMFuser needs taps of one width that its 3 heads divide, not 4 x"),
        (dict(fuser=MMFuser(2, levels=4)), "encoder 'a': MMFuser: 3 taps cannot give a query and 4 levels"),
        (dict(fuser=MMFuser(2, attention="sparse")), "attention must be deformable, global or linear, not 'sparse'"),
        (dict(aggregator=AdditiveMoF()), "AdditiveMoF adds the maps of two encoders, not of 1"),
        (dict(aggregator=InterleavedMoF()), "InterleavedMoF needs at least two encoders"),
        (dict(aggregator=SVA(8, 3, heads=2)), "SVA: grid 4 x 4 of encoder 'a' must be square and a multiple of 3"),
        (dict(aggregator=SVA(9, 4, heads=2)), "SVA: width 9 must be a multiple of its 2 heads"),
        (
            dict(llm=Decoder(40, 24, 2, 2, 2, 24, inserts=VisualInserts(SVALayer(8, 2), 0, 1, 1))),
            "MLPProjector has no windows on a grid of 4 for layers inside",
        ),
        (
            dict(seg=EmbedDistill(9, 4, (1,), 1, aligned=True)),
            "objective 'seg' is aligned: its 9 queries need a cell each, and the aggregator has 16 cells",
        ),
        (dict(seg=EmbedDistill(9, 4, (2,), 3)), r"objectives read the layers \[2\], and the model has 1..1"),
    ],
)
def test_what_does_not_fit_is_refused(parts, message):
    with pytest.raises(ValueError, match=message) as error:
        mllm(**parts)
    assert "\n" not in str(error.value)
