"""The options that several commands take, each told once."""

import os
from typing import Annotated

from gradpipe.options import Option
from gradpipe.pipeline.launch import slurm_shard
from gradpipe.pipeline.recipes import RECIPES
from gradpipe.store.schema import OBJECTIVES
from gradpipe.store.shard import Shard

Model = Annotated[
    str,
    Option(help="Model directory, Hub id, or `embedded`.", is_argument=True, is_recorded=False),
]

Task = Annotated[
    str | None,
    Option(
        help="{choices}.",
        choices=OBJECTIVES,
        default="by the architecture",
        is_recorded=False,
    ),
]

SeqLen = Annotated[
    int | None,
    Option(help="Tokens of a window.", least=2, default="2048, or the model's maximum"),
]

BatchSize = Annotated[
    int, Option(help="Samples in one pass; results depend on it up to rounding.", least=1)
]

Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1 …", is_recorded=False)]

Dtype = Annotated[
    str,
    Option(help="auto (the checkpoint's; float32 for float64), float32, bfloat16, float16."),
]

Include = Annotated[  # of stage two: docs/decisions/0005
    tuple[str, ...], Option(help="These layers alone; repeatable.", is_regex=True)
]

Exclude = Annotated[
    tuple[str, ...], Option(help="Layers to leave dense; repeatable.", is_regex=True)
]

RecipeName = Annotated[
    str | None,
    Option(
        help="{choices}: the recommended options; other flags change them.",
        choices=RECIPES,
        is_recorded=False,
    ),
]

ShardOption = Annotated[
    Shard | None,
    Option(
        help="Be job I of N on this store.",
        default="Slurm's array task",
        parse=Shard.parse,
        metavar="I/N",
        otherwise=lambda: slurm_shard(os.environ),
        is_recorded=False,
    ),
]

RankTimeout = Annotated[
    int,
    Option(
        help="Under torchrun, seconds to wait for a rank that does not answer.",
        least=1,
        is_recorded=False,
    ),
]

Overwrite = Annotated[bool, Option(help="Replace what exists.", is_recorded=False)]
