"""What the command line says of itself: examples, and the nearest name for a wrong one."""

import re
import shlex

import pytest

from jaxmllm.cli.main import COMMANDS, DATA_COMMANDS, parser


def refused(capsys, *args: str) -> str:
    """The one line for arguments that cannot be parsed."""
    with pytest.raises(SystemExit) as exit:
        parser().parse_args(list(args))
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    return line


@pytest.mark.parametrize(
    "args, says",
    [
        (["trian", "x"], "jaxmllm: there is no command 'trian'; did you mean 'train'?"),
        (["data", "chek", "x"], "jaxmllm data: there is no command 'chek'; did you mean 'check'?"),
        (["train", "x", "--workdri", "y"], "jaxmllm train: it takes no '--workdri'; did you mean '--workdir'?"),
        (["eval", "x", "--rowz", "y"], "jaxmllm eval: it takes no '--rowz'; did you mean '--rows'?"),
        (
            ["chat", "x", "y"],
            "jaxmllm chat: it takes no 'y'; known: --config, --help, --image, --max-new-tokens, "
            "--prompt, --repetition-penalty, --seed, --set, --stop, "
            "--temperature, --top-k, --top-p",
        ),
        (["plan", "x"], "jaxmllm plan: the following arguments are required: --topology"),
        ([], "jaxmllm: the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_name_gets_the_nearest(capsys, args, says):
    line = refused(capsys, *args)
    assert line.startswith(says) and re.search(r"\(jaxmllm( \w+)? --help shows how it is used\)$", line)


@pytest.mark.parametrize("module", [*COMMANDS, *DATA_COMMANDS])
def test_every_help_has_an_example_that_can_be_parsed(capsys, module):
    name = module.__name__.rpartition(".")[2].replace("data_", "data ").replace("_", "-").split()
    with pytest.raises(SystemExit):
        parser().parse_args([*name, "--help"])
    text = capsys.readouterr().out
    example = shlex.split(text[text.index("example: ") :])[1:]
    assert example[: 1 + len(name)] == ["jaxmllm", *name]
    assert parser().parse_args(example[1:]).run is module.run
