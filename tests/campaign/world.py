"""What every case starts from: tiny models in every form, texts, recipes, and undisturbed results to compare with.

Everything lies in one folder, is made when first asked for, under a lock, and is never changed afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
import pydoc_data.topics
import re
import shutil
import struct
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from tests.campaign import server
from tests.campaign.server import Bounds, Done, Stop

# Budgets of seconds for every stage.
QUICK = [
    *("--window", "64", "--tokens", "256", "--protect-first", "1", "--protect-last", "1", "--depth", "1"),
    *("--depth-samples", "2", "--depth-length", "32", "--wanda-samples", "2", "--wanda-length", "32"),
    *("--lora-samples", "12", "--lora-length", "32", "--lora-steps", "3", "--lora-batch", "4", "--lora-rank", "4"),
    *("--lora-save-steps", "1", "--quant-samples", "2", "--quant-length", "32", "--group", "32"),
    *("--eora", "4", "--eora-samples", "2", "--eora-length", "32"),
]
# Chains that differ in order, methods and what they write; {text} and {recipe} are the world's.
CHAINS: dict[str, list[str]] = {
    "five": [],
    "reordered": ["--recipe", "{recipe}", "--eora-bits", "8", "--quant-embeddings", "8"],
    "nf4": ["--quant", "nf4", "--recover", "qlora", "--wanda", "2:4", "--skip", "eora"],
    "awq": ["--quant", "awq4", "--wanda", "2:4", "--depth", "0", "--quant-embeddings", "4"],
    "hqq": ["--quant", "hqq4", "--pad-ffn", "96", "--wanda", "none", "--skip", "lora"],
    "vocabulary": ["--trim-vocabulary", "{corpus}", "--quant", "gptq8", "--eora-bits", "8", "--depth", "0"],
    "dora": ["--recover", "dora", "--prune", "sparsegpt", "--quant", "int8", "--skip", "eora,depth"],
    "homotopic": ["--homotopic", "2", "--wanda", "2:4", "--skip", "gptq,eora", "--lora-steps", "4"],
    "self": ["--data", "self", "--text", "{text}", "--recover", "ia3", "--prune", "magnitude", "--skip", "eora"],
    "distill": ["--distill", "0.5", "--distill-teacher", "streamed", "--depth", "0", "--skip", "eora"],
    "effort": ["--quant-effort", "high", "--quant-steps", "3", "--skip", "lora,depth", "--eora-bits", "8"],
    "gates": ["--prune", "gate-l1", "--metric", "taylor", "--skip", "gptq,eora,lora"],
}  # fmt: skip
_RECIPE = """\
stages:
  - lora: {rank: 4, samples: 12, length: 32, steps: 3, batch: 4, save_steps: 1}
  - wanda: {pattern: "1:8", samples: 2, length: 32}
  - depth: {remove: 1, protect_first: 1, protect_last: 1, samples: 2, length: 32}
  - gptq: {group: 32, samples: 2, length: 32}
  - eora: {rank: 4, samples: 2, length: 32}
"""
_SWEEP = """\
name: small
model: {model}
data: {text}
window: 64
tokens: 256
stages:
  - depth: {{remove: 1, protect_first: 1, protect_last: 1, samples: 2, length: 32}}
  - wanda: {{samples: 2, length: 32}}
  - gptq: {{group: 32, samples: 2, length: 32}}
sweep:
  configurations:
    - {{name: baseline, stages: []}}
    - {{name: depth, stages: [depth]}}
    - name: width {{wanda.pattern}}
      stages: [wanda, gptq]
      grid: {{wanda.pattern: ["1:8", "2:4"]}}
    - {{name: both, stages: [depth, wanda]}}
"""
EVAL = ["--window", "64", "--tokens", "512", "--dtype", "float32"]
QUESTIONS = 8


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """A file or folder of the world; `make` writes it to the path it is given, once."""
        path = self.folder / name
        if path.exists():
            return path
        with FileLock(self.folder / f".{name}.lock"):
            if not path.exists():
                draft = self.folder / f"draft-{name}"
                shutil.rmtree(draft, ignore_errors=True)
                make(draft)
                draft.rename(path)
        return path

    def run(self, *argv: object, folder: Path | None = None, stop: Stop | None = None) -> Done:
        done = server.compress(argv, folder or self.folder, Bounds((self.folder,)), stop, limit=600)
        if done.code not in (0, 3 if argv[0] == "check" else 0) and not done.stopped:
            raise RuntimeError(f"an undisturbed run failed: {done.command}\n{done.said}")
        return done

    # --- inputs ------------------------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> Path:
        """A LLaMA of 4 blocks in bfloat16, 512 tokens."""
        from tests.models import save_tiny

        return self.made("model", lambda p: save_tiny(p, num_hidden_layers=4, dtype="bfloat16"))

    @cached_property
    def text(self) -> Path:
        topics = [pydoc_data.topics.topics[name] for name in ("for", "try", "with", "while", "class")]
        return self.made("text.txt", lambda p: p.write_text("\n".join(topics)[:16000]))

    @cached_property
    def corpus(self) -> Path:
        return self.made("corpus.txt", lambda p: p.write_text(pydoc_data.topics.topics["for"] + "\n"))

    @cached_property
    def recipe(self) -> Path:
        return self.made("order.yaml", lambda p: p.write_text(_RECIPE))

    @cached_property
    def sweep(self) -> Path:
        return self.made("sweep.yaml", lambda p: p.write_text(_SWEEP.format(model=self.model, text=self.text)))

    @cached_property
    def questions(self) -> Path:
        rows = [{"context": f"Question: What is {i}?\nAnswer:", "answer": "e"} for i in range(QUESTIONS)]
        return self.made("questions.jsonl", lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in rows)))

    @cached_property
    def soc(self) -> Path:
        from edgepress.hardware import socs

        return self.made("chip.toml", lambda p: shutil.copy(Path(socs.__path__[0]) / "gap9.toml", p))

    @cached_property
    def llama2c(self) -> Path:
        """A folder with llama2.c's model.bin and tok512.bin."""
        return self.made("llama2c", write_llama2c)

    @cached_property
    def gguf(self) -> Path:
        return self.made("small.gguf", lambda p: write_gguf(p, self.model))

    # --- results -----------------------------------------------------------------------------------------------------

    def chain_argv(self, chain: str, out: Path) -> list[object]:
        names = {"recipe": self.recipe, "text": self.text, "corpus": self.corpus}
        chosen = [word.format(**names) for word in CHAINS[chain]]
        budgets, given = list(QUICK), set(chosen[::2])
        if chain == "reordered":  # the recipe lists the stages with their budgets
            budgets = QUICK[:4]
        budgets = [w for pair in zip(budgets[::2], budgets[1::2], strict=True) if pair[0] not in given for w in pair]
        data = [] if "--data" in given else ["--data", self.text]
        return ["--model", self.model, *data, *budgets, *chosen, "-o", out]

    def undisturbed(self, chain: str) -> Path:
        """The output folder of a chain that nothing disturbed."""
        return self.made(f"chain-{chain}", lambda p: self.run(*self.chain_argv(chain, p)))

    def unfinished(self, chain: str, event: int) -> Path:
        """The output folder of a chain that was killed at a file event."""

        def make(draft: Path) -> None:
            self.run(*self.chain_argv(chain, draft), stop=Stop(event=event))

        self.undisturbed(chain)
        return self.made(f"stopped-{chain}-{event}", make)

    def events(self, chain: str) -> int:
        """File events of a whole chain."""

        def make(draft: Path) -> None:
            out = self.folder / f"counted-{chain}"
            shutil.rmtree(out, ignore_errors=True)
            draft.write_text(str(self.run(*self.chain_argv(chain, out)).events))
            shutil.rmtree(out)

        return int(self.made(f"events-{chain}", make).read_text())

    def reported(self, chain: str) -> Path:
        """A copy of a chain's output folder, with its report."""

        def make(draft: Path) -> None:
            shutil.copytree(self.undisturbed(chain), draft, symlinks=True)
            self.run("report", draft, "--samples", "0")

        return self.made(f"reported-{chain}", make)

    @cached_property
    def swept(self) -> Path:
        return self.made("swept", lambda p: self.run("sweep", self.sweep, "-o", p))

    @cached_property
    def image(self) -> Path:
        return self.made("image.bin", lambda p: self.run("pack", self.last("five"), "--tokenizer", "-o", p))

    @cached_property
    def restored(self) -> Path:
        return self.made("restored", lambda p: self.run("unpack", self.image, "-o", p))

    def last(self, chain: str) -> Path:
        return (self.undisturbed(chain) / "result").resolve()

    @cached_property
    def answered(self) -> Path:
        """A folder of answers, and the report that came of them."""

        def make(draft: Path) -> None:
            draft.mkdir()
            self.run(*self.eval_argv(self.model, draft), folder=draft)

        return self.made("answered", make)

    def eval_argv(self, model: Path, folder: Path) -> list[object]:
        task = ["--task", "triviaqa-closed,perplexity", "--from", f"triviaqa-closed={self.questions}"]
        text = ["--text", self.text, "--window", "64", "--tokens", "256", "--new-tokens", "4"]
        return ["eval", model, *task, *text, "--answers", folder / "answers", "-o", folder / "scores.json"]

    def perplexity(self, model: Path) -> float:
        """What an unchanged model or checkpoint measures, by our own command."""

        def make(draft: Path) -> None:
            draft.write_text(str(number(self.run("eval", model, "--text", self.text, *EVAL).out)))

        name = hashlib.sha256(str(model).encode()).hexdigest()[:12]
        return float(self.made(f"perplexity-{name}", make).read_text())


def number(said: str) -> float:
    """The perplexity in what `eval` said; NaN where there is none."""
    match = re.search(r"perplexity (\S+)", said)
    return float(match[1]) if match else math.nan


def plain_perplexity(model: Path, text: str, target: Path, gguf: str | None = None) -> None:
    """A plain transformers loop over EVAL's windows, its number written to a file. An independent formula of ours."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more = {"gguf_file": gguf} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, **more)
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, trust_remote_code=False, attn_implementation="sdpa", **more
    ).eval()
    ids = torch.tensor(tokenizer(text)["input_ids"][:512])
    total, count = 0.0, 0
    with torch.no_grad():
        for window in ids.view(-1, 64):
            logits = network(window[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += 63
    target.write_text(repr(math.exp(total / count)))


def weights(out: Path) -> dict[str, str]:
    """Sha256 of all that a store's stage folders or a checkpoint hold which decides what a model computes."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out)
        decides = path.suffix == ".safetensors" or path.name in ("config.json", "adapter_config.json")
        inside = not {".work", "calibration", "result"} & set(name.parts)
        if decides and inside and path.is_file():
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def perplexities(out: Path) -> list[Any]:
    """Fingerprints and perplexities in a store's report.json."""
    stages = json.loads((out / "report.json").read_text())["stages"]
    return [(s["stage"], s["fingerprint"], s["perplexity"]["before"], s["perplexity"]["after"]) for s in stages]


# --- files of other programs ---------------------------------------------------------------------------------------


def write_llama2c(folder: Path) -> None:
    """A model of random weights and a tokenizer of single bytes, as llama2.c exports them."""
    import torch

    folder.mkdir()
    dim, hidden, layers, heads, kv, vocabulary, length = 32, 64, 2, 4, 2, 512, 128
    width = dim // heads
    counts = [
        (vocabulary, dim), (layers, dim), (layers, dim, dim), (layers, kv * width, dim), (layers, kv * width, dim),
        (layers, dim, dim), (layers, dim), (layers, hidden, dim), (layers, dim, hidden), (layers, hidden, dim), (dim,),
        (length, width // 2), (length, width // 2),
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    body = b"".join((0.2 * torch.randn(c, generator=generator)).numpy().tobytes() for c in counts)
    header = struct.pack("<7i", dim, hidden, layers, heads, kv, vocabulary, length)
    (folder / "model.bin").write_bytes(header + body)
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    pieces += [bytes([byte]) for byte in range(32, 127)]
    pieces += [bytes([a, b]) for a in b"etaoinsh" for b in b"etaoinshrdlucmfwypvbgk"][: vocabulary - len(pieces)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)]
    entries = b"".join(struct.pack("<fi", s, len(p)) + p for p, s in zip(pieces, scores, strict=True))
    (folder / "tok512.bin").write_bytes(struct.pack("<i", max(map(len, pieces))) + entries)


def write_gguf(path: Path, model: Path) -> None:
    """A LLaMA and its byte-level tokenizer as a GGUF file of 16-bit floats."""
    import torch
    from gguf import GGUFWriter
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    pieces = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_types([3 if index < 3 else 1 for _, index in pieces])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    inner = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in load_file(model / "model.safetensors").items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
        where = f"blk.{layer[1]}.{inner[layer[2]]}" if layer else outer[name.removesuffix(".weight")]
        if layer and layer[2] in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp's order of rotary halves
            heads = config["num_attention_heads" if "q_proj" in layer[2] else "num_key_value_heads"]
            rows, columns = tensor.shape
            tensor = tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        array = tensor.float().numpy() if tensor.dim() == 1 else tensor.to(torch.float16).numpy()
        writer.add_tensor(f"{where}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def warm_up(world: World) -> None:
    """Let a throwaway child find out what commands load, and load it here."""
    out = world.folder / "warm-up"
    names: dict[str, None] = {}
    for argv in (
        world.chain_argv("distill", out),
        ["report", out, "--samples", "0"],
        world.eval_argv(world.model, out),
    ):
        names |= dict.fromkeys(server.loaded_by(argv, world.folder))
    shutil.rmtree(out, ignore_errors=True)
    server.preload([name for name in names if name not in sys.modules])
