"""Every supported family against plain transformers: the same perplexity, before and after blocks and weights go."""

from __future__ import annotations

import gc
import json
import math
import pydoc_data.topics
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.families import known_families
from edgepress.checkpoints.runtime import Runtime
from edgepress.eval.perplexity import Protocol, measure
from edgepress.eval.text import load_text
from tests.models import ALL_FAMILIES, save_tiny

pytestmark = pytest.mark.pipeline

Compress = Callable[..., Any]
LENGTH, COUNT = 32, 6  # tokens of a window, four times the attention's own; windows
CLOSE = 1e-4  # relative


@pytest.fixture(scope="module", autouse=True)
def collected_quickly() -> Iterator[None]:
    """Each stage collects garbage to measure its memory; what the libraries loaded need not be looked through again."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:12]))
    return path


def windows(folder: Path, prose: Path) -> Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(prose.read_text(), return_tensors="pt")["input_ids"]
    return ids[0, : LENGTH * COUNT].view(COUNT, LENGTH)


def plain_perplexity(folder: Path, prose: Path, **options: Any) -> float:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    ids = windows(folder, prose)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1]
    assert logits.std() > 0.05  # else no order, mask or position could show
    return math.exp(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())


def our_perplexity(folder: Path, prose: Path) -> float:
    text = load_text(str(prose), "whole")
    return measure(Checkpoint.open(folder), text, Protocol("windows", LENGTH, LENGTH * COUNT), Runtime()).perplexity


def silent_sizes(family: str) -> dict[str, Any]:
    """Sizes with which all that a family's configuration class fills in gives a small model that works."""
    stated: dict[str, Any] = {"num_hidden_layers": 4, "vocab_size": 512, "dtype": "float32"}
    stated |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # the families' own exceed this vocabulary
    heads = getattr(AutoConfig.for_model(family), "num_key_value_heads", None)
    default = type(AutoConfig.for_model(family)).num_key_value_heads if heads is not None else None
    stated["num_attention_heads"] = count = default if isinstance(default, int) else 4
    stated["hidden_size"] = count * (16 if count < 16 else 8)
    inner = "ffn_hidden_size" if family == "falcon" else "intermediate_size"
    return stated | {inner: 128} | NOT_FILLED_IN.get(family, {})


def save_silent(folder: Path, family: str) -> Path:
    """A model whose config.json holds its sizes alone; all else is for the family's configuration class to fill in."""
    sizes = silent_sizes(family)
    save_tiny(folder, family, **(dict.fromkeys((*_ALWAYS, *ALL_FAMILIES[family]), ...) | sizes))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    kept = {key: value for key, value in config.items() if key in (*sizes, "model_type", "architectures")}
    path.write_text(json.dumps(kept))
    return folder


_ALWAYS = ("num_key_value_heads", "head_dim", "max_position_embeddings")
# Where transformers' own default makes a module that cannot compute, or not at these sizes.
NOT_FILLED_IN: dict[str, dict[str, Any]] = {
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES))
@pytest.mark.parametrize("silent", [False, True], ids=["stated", "silent"])
def test_perplexity_is_that_of_a_plain_loop(tmp_path: Path, prose: Path, family: str, silent: bool) -> None:
    folder = save_silent(tmp_path / "m", family) if silent else save_tiny(tmp_path / "m", family)
    assert our_perplexity(folder, prose) == pytest.approx(plain_perplexity(folder, prose), rel=CLOSE)


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES))
def test_what_is_pruned_still_agrees_with_transformers(
    compress: Compress, tmp_path: Path, prose: Path, family: str
) -> None:
    """One block and a quarter of the weights less: every list with an entry a block is cut with it."""
    model, out = save_tiny(tmp_path / "m", family), tmp_path / "out"
    done = compress(
        *("--model", model, "--text", prose, "--data", prose, "-o", out, "--skip", "lora,gptq,eora"),
        *("--window", LENGTH, "--tokens", LENGTH, "--dtype", "float32", "--depth", 1, "--wanda", "1:4"),
        *("--layers", "0,1,3,4,5", "--wanda-samples", 2, "--wanda-length", LENGTH),
    )
    assert done.returncode == 0, done.stderr
    result = out / "result"
    assert our_perplexity(result, prose) == pytest.approx(plain_perplexity(result, prose), rel=CLOSE)
    assert json.loads((result / "config.json").read_text())["num_hidden_layers"] == 5
    hardware = json.loads((out / "report.json").read_text())["hardware"]
    assert "memories" in hardware or hardware["summary"].startswith("no verdict: ")


ROPE: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}),
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 4.0}),
    "yarn": ("qwen3", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.3 * i for i in range(8)],
        },
    ),
    "proportional": ("gemma3_text", {"full_attention": {"rope_type": "linear", "factor": 8.0}}),
}


@pytest.mark.parametrize("kind", ROPE)
def test_scaled_rotary_positions(tmp_path: Path, prose: Path, kind: str) -> None:
    """Windows longer than the positions that the model was first trained on, where the scaling says what happens."""
    family, scaling = ROPE[kind]
    positions = {"dynamic": 16, "longrope": 64}.get(kind, 256)
    own = {"rope_parameters": scaling, "max_position_embeddings": positions}
    if kind == "longrope":
        own["original_max_position_embeddings"] = 16
    scaled, plain = save_tiny(tmp_path / "m", family, **own), save_tiny(tmp_path / "plain", family)
    ours = our_perplexity(scaled, prose)
    assert ours == pytest.approx(plain_perplexity(scaled, prose), rel=CLOSE)
    assert ours != pytest.approx(our_perplexity(plain, prose), rel=10 * CLOSE)


@pytest.mark.parametrize(
    "stray",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_3"},
        {"_attn_implementation_internal": "flash_attention_2"},
        {"_attn_implementation": "eager"},
        {"_flash_attn_2_enabled": True, "use_flash_attention": True},
        {"output_attentions": True, "output_hidden_states": True},
    ],
    ids=lambda stray: "-".join(stray),
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon"])
def test_kernels_named_by_the_configuration_change_nothing(
    compress: Compress, tmp_path: Path, prose: Path, family: str, stray: dict[str, Any]
) -> None:
    folder = save_tiny(tmp_path / "m", family)
    expected = our_perplexity(folder, prose)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | stray))
    assert our_perplexity(folder, prose) == expected
    done = compress("generate", folder, "for each", "--tokens", 4)
    assert done.returncode == 0, done.stderr


def test_readme_lists_them_all() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    _, _, after = readme.partition("Measured as plain transformers measures them")
    shaped, _, rest = after.partition("\n\n")[0].partition("Without those two")
    found = [set(re.findall(r"`([a-z0-9_]+)`", words)) - {"model_type"} for words in (shaped, rest)]
    assert found == [set(known_families()), set(ALL_FAMILIES) - set(known_families())]
