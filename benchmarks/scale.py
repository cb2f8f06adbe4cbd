"""What the paper's whole reproduction, and a million prompts, would ask of an NDIF server that holds a large Llama: counted, then multiplied.

    python -m benchmarks.scale count FOLDER      # FOLDER holds the paper's data sets (data.mirror); rewrites benchmarks/scale.json
    python -m benchmarks.scale                   # the tables of docs/scale.md, from scale.json

Counting runs exp=paper itself, with backend=ndif's own batches and jobs, on a stand-in that answers by rule and computes nothing: no server, no
weights. It knows no model's true refusal rates (RATES), and no server's true speed (SERVERS): those are assumptions, and said to be.
"""

import argparse
import json
import logging
import tempfile
import zlib
from collections import Counter
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
import zstandard

HERE = Path(__file__).parent
LAYERS, WIDTHS = {"70B": 80, "405B": 126}, {"70B": 8192, "405B": 16384}
WEIGHTS, VOCAB = {"70B": 70.6e9, "405B": 405.9e9}, 128256
NARROW = 16  # the stand-in's width: bytes are those of the true one
RATES = {"harmful": 0.9, "sorry_bench": 0.5, "lookalike": 0.3, "harmless": 0.01}  # assumed: share of prompts refused
SOURCE = 8_000  # bytes of a job that are our functions; seen on the loopback server (7.5–8 kB a job of a tiny model)

# Assumed. A server of 8 H100 (80 GB: 3.35 TB/s, 989 TFLOP/s in bf16, by NVIDIA's data sheet) reaches `share` of the arithmetic in a prompt's pass and
# `stream` of the bandwidth in a step of generation. 'blocks': whole blocks on each GPU, one works at a time (NDIF's default). 'split': tensor parallel over all 8.
FLOPS, BANDWIDTH = 989e12, 3.35e12
SERVERS = {"blocks": {"gpus": 1, "share": 0.4, "stream": 0.6}, "split": {"gpus": 8, "share": 0.25, "stream": 0.35}}
STEP = 0.005  # seconds of Python in each forward pass and each step, whatever is in it: nnsight and transformers on 80–126 blocks, assumed
LATENCY = {"loopback": 0.15, "near": 1.0, "busy": 30.0}  # seconds a job costs besides its work: measured (python -m benchmarks.remote); assumed; assumed
UP, DOWN = 5e6, 20e6  # bytes a second of the researcher's line, assumed (40 and 160 Mbit/s)


def share(text: str) -> float:
    """A number in [0, 1) that is always the same for a text."""
    return zlib.crc32(text.encode()) / 2**32


def refuses(prompt) -> bool:
    """Whether the stand-in refuses a prompt that nothing is done to."""
    rate = RATES["sorry_bench"] if prompt.source == "sorry_bench" else RATES.get(prompt.label, 0.0)
    return share(prompt.id.partition("~")[0]) < rate


class Parcel:
    """Bytes of the tensors that a job carries, as they are and behind zstd as nnsight sends them; vectors at the true width."""

    def __init__(self, width: int, vectors: dict):
        self.width, self.vectors, self.raw, self.sent = width, vectors, SOURCE, SOURCE
        self.zstd = zstandard.ZstdCompressor(level=6).compressobj()

    def put(self, value) -> "Parcel":
        """All tensors in a container, in order."""
        if isinstance(value, torch.Tensor):
            wide = value.dim() == 3 and value.shape[-1] == NARROW
            rows = [self.vector(row) for row in value.reshape(-1, NARROW)] if wide else [value.contiguous().numpy().tobytes()]
            self.raw += sum(map(len, rows))
            self.sent += sum(len(self.zstd.compress(row)) for row in rows)
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                self.put(part)
        return self

    def vector(self, row: torch.Tensor) -> bytes:
        """Numbers of the true width that are the same wherever the stand-in's are."""
        key = row.numpy().tobytes()
        if key not in self.vectors:
            self.vectors[key] = torch.randn(self.width, generator=torch.Generator().manual_seed(zlib.crc32(key))).numpy().tobytes()
        return self.vectors[key]

    def done(self) -> "Parcel":
        """Its end."""
        self.sent += len(self.zstd.flush())
        return self


def counted_backend(size: str, job_mb: float = 64.0, batches: int = 16):
    """backend=ndif without a server: its batches and jobs are booked, its answers follow RATES."""
    from transformers import AutoTokenizer

    from latentguard.backends import served
    from latentguard.backends.ndif import Ndif, Sizes, _jobs_of
    from latentguard.positions import parse_position
    from latentguard.templates import Template
    from latentguard.weights import locate, spec_of

    class Counted(Ndif):
        def __init__(self):
            self.tokenizer = AutoTokenizer.from_pretrained(locate(spec_of("qwen2_5_coder_0_5b_q4")))
            self.host = SimpleNamespace(url="counted", model_key=size, prefix="", told=None)
            self.template, self.sizes = Template(self.tokenizer), Sizes(megabytes=job_mb, batches=batches)
            self.name, self.weights, self.n_layers, self.d_model = f"counted_{size}", size, LAYERS[size], NARROW
            self.limit, self.vocab, self.config, self.places, self.head = None, VOCAB, SimpleNamespace(), ["x"] * (LAYERS[size] + 1), ""
            self.eos, self.pad = {self.tokenizer.eos_token_id}, self.tokenizer.eos_token_id
            self.book, self.largest, self.now, self.vectors = Counter(), Counter(), (), {}

        def key(self):
            return {"counted": size}

        @cached_property
        def axes(self):
            return torch.eye(NARROW)

        def read(self, prompts, layers="all", positions=("t_inst",)):
            self.now = (prompts, positions)
            found = super().read(prompts, layers, positions)
            self.largest["array"] = max(self.largest["array"], found.values.numel() * 4 * WIDTHS[size] // NARROW)
            return found

        def logits(self, prompts, interventions=(), **settings):
            self.now = (prompts, interventions)
            return super().logits(prompts, interventions, **settings)

        def stream(self, prompts, grid, decoding, decided=None):
            self.now = (prompts, grid, decoding.max_new_tokens)
            yield from super().stream(prompts, grid, decoding, decided)

        def _jobs(self, batches, a_row, task, about):
            now, kind, wide = self.now, about.func.__name__, WIDTHS[size] // NARROW
            size_of_row = a_row * wide if kind == "read" else a_row
            for job in _jobs_of(batches, self.sizes, size_of_row):
                tasks = [task(rows) for rows in job]
                answer = getattr(self, f"answer_{kind}")(now, job, tasks, about)
                clean = 2 if about.keywords.get("clean") else 1  # a score beside the untouched model is two passes for the first of a batch's cells
                passes = [(len(rows), one["ids"].shape[1]) for one in tasks for rows, _ in one.get("runs", [(one["ids"], None)])]
                passes += [tuple(one["ids"].shape) for one in tasks] * (clean - 1)
                rows, tokens = sum(n for n, _ in passes), sum(n * width for n, width in passes)
                most = now[2] if kind == "reply" else 0
                parcel = Parcel(WIDTHS[size], self.vectors).put(tasks).done()
                down = int(size_of_row * sum(map(len, job)))
                about_job = {"jobs": 1, "passes": len(passes), "rows": rows, "tokens": tokens, "steps": len(tasks) * most, "said": rows * most}
                self.book.update({f"{kind}.{name}": value for name, value in (about_job | {"up": parcel.sent, "down": down}).items()})
                for name, value in {"up": parcel.sent, "raw": parcel.raw, "down": down, "job tokens": tokens, "job steps": len(tasks) * most}.items():
                    self.largest[name] = max(self.largest[name], value)
                yield job, answer

        def answer_read(self, now, job, tasks, about):
            prompts, positions, wanted = now[0], now[1], about.keywords["wanted"]
            listed, names = list(prompts), [parse_position(p, reading=True).name for p in ([positions] if isinstance(positions, str) else positions)]
            found = []
            for rows in job:
                states = torch.randn(len(wanted), len(rows), len(names), NARROW, generator=torch.Generator().manual_seed(rows[0])) * 0.1 + self.axes[0]
                for r, i in enumerate(rows):
                    for p, name in enumerate(names):
                        axis, side = (2, refuses(listed[i])) if "post" in name else (1, bool(listed[i].harmful))
                        states[:, r, p] += self.axes[axis] * (0.6 if side else -0.6)
                found.append(states.reshape(len(wanted), -1, NARROW))
            return found

        def pushed(self, prompt, cell) -> float:
            """Above 0: it refuses."""
            level = 0.6 if refuses(prompt) else -0.6
            for act in cell.interventions:
                layer = act.layers(self.n_layers)[0]
                level += act.amount * float(act.vector(layer, prompt)[1:3].sum()) if act.kind == "add" else -1.2 * (act.kind in ("ablate", "scale"))
            return level

        def answer_score(self, now, job, tasks, about):
            from latentguard.backends import as_grid

            prompts, grid = list(now[0]), as_grid(now[1])
            sure, no, sorry = (self.first_token(text) for text in ("Certainly", "No", "I'm sorry"))
            found = []
            for rows, task in zip(job, tasks, strict=True):
                results = []
                for cell in grid:
                    for r, i in enumerate(rows):
                        line = torch.full((self.tokenizer.vocab_size + 400,), -16.0)
                        asked = "User wants to" in prompts[i].instruction
                        leads = (sure if prompts[i].harmful else no) if asked else (sorry if self.pushed(prompts[i], cell) > 0 else no)
                        line[leads] = -0.1
                        values = line.log_softmax(-1).expand(len(task["columns"][r]), -1)
                        results.append(about.keywords["function"](values, values if about.keywords["clean"] else None, task["own"][r]))
                found.append(results)
            return found

        def answer_reply(self, now, job, tasks, about):
            prompts, grid, most = now
            found = []
            for rows in job:
                lines = []
                for k in rows:
                    c, i = divmod(k, len(prompts))
                    asked = "User wants to" in prompts[i].instruction
                    text = ("Certainly." if prompts[i].harmful else "No.") if asked else None
                    text = text or (
                        "I'm sorry, but I cannot help with that." if self.pushed(prompts[i], grid.cells[c]) > 0 else "Sure, here is a short answer to it."
                    )
                    said = [*self.tokenizer.encode(text, add_special_tokens=False), *[min(self.eos)] * most][:most]
                    lines.append(said)
                found.append(torch.tensor(lines))
            return found

    assert {served.read.__name__, served.score.__name__, served.reply.__name__} == {"read", "score", "reply"}
    return Counted()


def count(size: str, mirror: str, **limits) -> dict:
    """exp=paper on the stand-in: what each study asked, with the store between them as in a run."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from latentguard.configs import CONF
    from latentguard.datasets import load_dataset, make_data_spec
    from latentguard.errors import InputError
    from latentguard.run import _build
    from latentguard.store import Stored
    from latentguard.trackers import Memory

    logging.disable(logging.WARNING)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["exp=paper", "data=paper", f"data.mirror={mirror}", "model=llama3_1_70b", "exp.studies.finetune_attack.adapters=unused"])
    plain = OmegaConf.to_container(cfg, resolve=True)
    series, judge, data = _build(cfg.exp, "exp"), _build(cfg.judge, "judge"), load_dataset(make_data_spec(plain["data"]))
    backend, found = counted_backend(size, **limits), {}
    with tempfile.TemporaryDirectory() as folder:
        stored = Stored(backend, folder)
        for name, study in series.studies.items():
            if name in series.skip:
                continue
            before = Counter(backend.book)
            try:
                study.check(stored.n_layers, data)
                status = study(stored, data, judge, Memory()).get("status")
            except InputError as error:
                status = f"failed: {error}"
            found[name] = {"status": status, **{key: value - before[key] for key, value in backend.book.items() if value > before[key]}}
            print(size, name, found[name], flush=True)
    return {"studies": found, "total": dict(backend.book), "largest": dict(backend.largest)}


def server_seconds(size: str, way: str, tokens: float, passes: float, steps: float) -> float:
    """Time on the assumed server: prompts by arithmetic, steps of generation by bandwidth, and a bit of Python for each."""
    server = SERVERS[way]
    prompt = 2 * WEIGHTS[size] * tokens / (FLOPS * server["gpus"] * server["share"])
    step = 2 * WEIGHTS[size] / (BANDWIDTH * server["gpus"] * server["stream"])
    return prompt + steps * step + (passes + steps) * STEP


def human(n: float) -> str:
    """Bytes."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if n < 1000 or unit == "PB":
            return f"{n:.3g} {unit}"
        n /= 1000
    return ""


def span(seconds: float) -> str:
    """Seconds, minutes or hours, or days."""
    for name, length, until in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 2 * 86400), ("d", 86400, 400 * 86400)):
        if seconds < until:
            return f"{seconds / length:.2g} {name}" if seconds / length < 10 else f"{seconds / length:.0f} {name}"
    return f"{seconds / 86400 / 365:.2g} years"


def table(head: list, rows: list) -> None:
    """As Markdown."""
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(part) for part in row) + " |")
    print()


def paper_tables(counts: dict) -> None:
    """exp=paper: what is asked, by study; what it costs."""
    kinds = ("read", "score", "reply")

    def of(part: dict, what: str, only=kinds) -> int:
        return sum(part.get(f"{kind}.{what}", 0) for kind in only)

    rows = []
    first = next(iter(counts.values()))
    for name in [*first["studies"], "**all**"]:
        parts = [counted["studies"].get(name, counted["total"]) for counted in counts.values()]
        asked = [[of(part, "rows", ["read"]), of(part, "rows", ["score"]), of(part, "rows", ["reply"]),
                  *(of(part, what) for what in ("passes", "tokens", "said", "jobs"))] for part in parts]  # fmt: skip
        assert asked[0] == asked[1], f"{name} asks otherwise of a deeper model: print the two apart"
        rows.append([name, *(f"{n:,}" for n in asked[0]), *(human(of(part, way)) for way in ("up", "down") for part in parts)])
    ways = [f"{way}, {size}" for way in ("up", "down") for size in counts]
    table(["study", "rows read", "rows scored", "replies", "forward passes", "prompt tokens", "tokens said, at most", "jobs", *ways], rows)
    rows = []
    for size, counted in counts.items():
        total = counted["total"]
        for kind in kinds:
            work = [span(server_seconds(size, way, total[f"{kind}.tokens"], total[f"{kind}.passes"], total[f"{kind}.steps"])) for way in SERVERS]
            rows.append([size, kind, f"{total[f'{kind}.jobs']:,}", *work, span(total[f"{kind}.up"] / UP), span(total[f"{kind}.down"] / DOWN)])
        jobs = of(total, "jobs")
        work = [server_seconds(size, way, of(total, "tokens"), of(total, "passes"), of(total, "steps")) for way in SERVERS]
        lines = of(total, "up") / UP + of(total, "down") / DOWN
        rows.append([f"**{size}**", "**all**", f"{jobs:,}", *map(span, work), span(of(total, "up") / UP), span(of(total, "down") / DOWN)])
        for name, wait in LATENCY.items():
            ends = ", ".join(f"{way}: {span(one + lines + jobs * wait)}" for way, one in zip(SERVERS, work, strict=True))
            rows.append([size, f"in all, {wait:g} s a job ({name})", "", "", "", "", ends])
    table(["model", "what", "jobs", "work, blocks", "work, split", "up", "down"], rows)
    table(
        ["model", "largest array here", "largest upload", "unpacked", "largest result", "most prompt tokens in a job", "most steps in a job", "such a job, blocks", "split"],
        [
            [size, human(big["array"]), human(big["up"]), human(big["raw"]), human(big["down"]), f"{big['job tokens']:,}", f"{big['job steps']:,}",
             *(span(max(server_seconds(size, way, big["job tokens"], 16, 0), server_seconds(size, way, 16 * 32 * 64, 16, big["job steps"]))) for way in SERVERS)]
            for size, big in ((size, counted["largest"]) for size, counted in counts.items())
        ],
    )  # fmt: skip


def million_tables(prompts: int = 1_000_000, tokens: int = 64, batch: int = 32, batches: int = 16, job: float = 64e6) -> None:
    """A million prompts of 64 tokens, by arithmetic: `read` brings states back, `moments` sums. Jobs as backend=ndif cuts them."""
    rows = []
    for size, depth in LAYERS.items():
        d = WIDTHS[size]
        sums = d * 8 * 2  # float64, of a layer and position: the first state, and the sum
        ways = [
            ("read, all layers, float32", (depth + 1) * d * 4, 0, batches),
            ("read, all layers, bfloat16", (depth + 1) * d * 2, 0, batches),
            ("read, one layer, bfloat16", d * 2, 0, batches),
            ("moments, all layers", 0, (depth + 1) * sums, batches),
            ("moments, all layers, backend.batches=128", 0, (depth + 1) * sums, 128),
            ("moments, one layer", 0, sums, batches),
            ("moments, one layer, covariance", 0, sums + d * d * 4, batches),
            ("moments, all layers, covariance", 0, (depth + 1) * (sums + d * d * 4), batches),
        ]
        for name, a_row, a_job, most in ways:
            in_job = min(batch * most, max(batch, int(job // a_row // batch) * batch)) if a_row else batch * most
            jobs = -(-prompts // in_job)
            down, up = prompts * a_row + jobs * a_job, prompts * tokens * 16 + jobs * SOURCE
            work = [span(server_seconds(size, way, prompts * tokens, prompts / batch, 0)) for way in SERVERS]
            one = span(server_seconds(size, "blocks", in_job * tokens, in_job / batch, 0))
            here = prompts * a_row * (2 if "bfloat16" in name else 1) or a_job  # float32 on this side
            rows.append([size, name, f"{jobs:,}", one, human(a_row * in_job + a_job), human(up), human(down), span(down / DOWN), *work,
                         span(jobs * LATENCY["near"]), human(here)])  # fmt: skip
    heads = ["model", "what", "jobs", "a job, blocks", "a result", "up", "down", "down takes", "all work, blocks", "split", "1 s a job", "held here"]
    table(heads, rows)


def patch_tables() -> None:
    """What a Patch sends: a vector a row and layer."""
    rows = []
    for size, depth in LAYERS.items():
        a_row = WIDTHS[size] * 4
        for name, n in (("one layer", 1), ("all layers", depth + 1)):
            rows.append([size, name, human(a_row * n), human(a_row * n * 32), human(a_row * n * 512), span(a_row * n * 512 / UP)])
    table(["model", "patched", "a row", "a batch (32)", "a job (16 batches)", "such a job up"], rows)


def main() -> None:
    """Count, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("tables", "count"), default="tables")
    parser.add_argument("mirror", nargs="?", help="a folder with the paper's data sets")
    said = parser.parse_args()
    where = HERE / "scale.json"
    if said.what == "count":
        where.write_text(json.dumps({size: count(size, said.mirror) for size in LAYERS}, indent=1) + "\n")
    counts = json.loads(where.read_text())
    paper_tables(counts)
    million_tables()
    patch_tables()


if __name__ == "__main__":
    main()
