"""What serving costs: eight clients against the real process on loopback, beside the same texts scored offline in the same run.

    python -m benchmarks.serving model=tiny                            random weights, a guard that was never fitted
    python -m benchmarks.serving model=qwen2_5_coder_0_5b_q4 requests=200 rounds=2
    python -m benchmarks.serving model=NAME guard=FOLDER               a guard of one's own

Offline is `guard.score` on the texts in the order in which they arrive, as many at a time as the server takes into a batch. Rounds
alternate, so that what else the machine does falls on both. Prints and writes JSON: throughput of each, their ratio, latencies, errors,
and the server's memory after every round: it should come to rest.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

WORDS = (
    "the a of to and in is it you that he was for on are with as his they be at one have this from or had by hot but some what there we can out other were all"
)
ASKED = {"model": "tiny", "guard": "", "requests": "2000", "clients": "8", "rounds": "4", "batch": "8", "inputs": "1", "out": "", "words": ""}


def texts(n: int, seed: int = 0) -> list[str]:
    """Mixed lengths: a median of 20 words, one in twenty over 90."""
    r = random.Random(seed)
    return [" ".join(r.choice(WORDS.split()) for _ in range(min(400, max(2, round(r.lognormvariate(3, 0.9)))))) for _ in range(n)]


async def client(port: int, todo: list, found: dict, took: list, wrong: list) -> None:
    """Asks one request after another over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while todo:
        index, given = todo.pop()
        body = json.dumps({"input": given}).encode()
        begun = time.perf_counter()
        writer.write(b"POST /v1/moderations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        answer = json.loads(await reader.readexactly(length))
        took.append(time.perf_counter() - begun)
        if int(head.split()[1]) == 200:
            found[index] = [result["category_scores"]["harmful"] for result in answer["results"]]
        else:
            wrong.append(answer)
    writer.close()


async def crowd(port: int, clients: int, requests: list) -> tuple[float, dict, list, list]:
    """All requests by so many clients: seconds, scores by request, latencies, errors."""
    todo, found, took, wrong = list(enumerate(requests))[::-1], {}, [], []
    begun = time.perf_counter()
    await asyncio.gather(*(client(port, todo, found, took, wrong) for _ in range(clients)))
    return time.perf_counter() - begun, found, took, wrong


def counted(port: int) -> list[float]:
    """The server's own counts: batches, their texts, their seconds."""
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines() if not line.startswith("#"))
    return [float(lines[f"latentguard_batch_{key}"]) for key in ("prompts_count", "prompts_sum", "seconds_sum")]


def spent(process: psutil.Process, before: Any) -> float:
    """CPU seconds of a process since."""
    now = process.cpu_times()
    return now.user + now.system - before.user - before.system


def main() -> None:
    given = {**ASKED, **dict(word.split("=", 1) for word in sys.argv[1:])}
    if unknown := set(given) - set(ASKED):
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(ASKED)}")
    clients, rounds, batch, inputs = (int(given[key]) for key in ("clients", "rounds", "batch", "inputs"))
    import latentguard as lg
    from tests.serving import tiny_guard

    backend = lg.load(given["model"])
    if given["guard"]:
        from latentguard.guards import LatentGuard

        folder = given["guard"]
        guard = LatentGuard.load(folder, backend)
    else:
        guard = tiny_guard(backend, layers=(backend.n_layers // 2, round(0.75 * backend.n_layers)))
        folder = str(guard.save(Path(tempfile.mkdtemp()) / "guard"))
    # `linger_ms` and the rest are the defaults, so that what is measured is what people get
    command = [
        sys.executable,
        "-m",
        "latentguard.serve",
        f"guard={folder}",
        f"model={given['model']}",
        "port=0",
        f"batch_prompts={batch}",
        "timeout=600",
        *given["words"].split(),
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    log = Path(tempfile.mkstemp()[1])
    port = 0
    for line in server.stderr:
        port = int(line.rsplit(":", 1)[1]) if "listening on" in line else port
        if "ready after" in line:
            break
    drain = subprocess.Popen(["tee", str(log)], stdin=server.stderr, stdout=subprocess.DEVNULL)
    every = texts(int(given["requests"]) * inputs)
    asked = [every[at : at + inputs] for at in range(0, len(every), inputs)]
    guard.score(every[:batch])
    asyncio.run(crowd(port, clients, asked[: 4 * clients]))  # both have met their work before a clock runs
    process, of_server = psutil.Process(), psutil.Process(server.pid)
    memory, rows, latencies, errors = of_server.memory_info().rss, [], [], 0
    for number in range(rounds):
        part = asked[number::rounds]
        flat = [text for request in part for text in request]
        begun, own = time.perf_counter(), process.cpu_times()
        offline = np.concatenate([guard.score(flat[at : at + batch]) for at in range(0, len(flat), batch)])
        alone, alone_cpu = time.perf_counter() - begun, spent(process, own)
        own, others, batches = process.cpu_times(), of_server.cpu_times(), counted(port)
        served, found, took, wrong = asyncio.run(crowd(port, clients, part))
        cpu = spent(of_server, others)
        more = [now - before for now, before in zip(counted(port), batches, strict=True)]
        errors += len(wrong)
        latencies += took
        apart = max((float(np.abs(np.array(found[i]) - offline[i * inputs : (i + 1) * inputs]).max()) for i in found), default=float("nan"))
        rows.append(
            {"texts": len(flat), "offline_per_s": len(flat) / alone, "served_per_s": len(flat) / served, "ratio": alone / served, "scores_apart": apart}
        )
        rows[-1] |= {
            "offline_cpu_ms": 1000 * alone_cpu / len(flat),
            "server_cpu_ms": 1000 * cpu / len(flat),
            "client_cpu_ms": 1000 * spent(process, own) / len(flat),
            "server_mb": of_server.memory_info().rss / 1e6,
        }
        rows[-1] |= {"texts_a_batch": more[1] / more[0], "model_share": more[2] / served}  # of the time, with the model at work
        print(json.dumps(rows[-1]), flush=True)
    grown = of_server.memory_info().rss - memory
    server.terminate()
    code = server.wait()
    drain.wait()
    summary = {
        "model": given["model"], "requests": len(asked), "inputs": inputs, "clients": clients, "batch": batch, "cores": len(os.sched_getaffinity(0)), "errors": errors,
        "ratio": statistics.median(row["ratio"] for row in rows), "ratio_low": min(row["ratio"] for row in rows), "ratio_high": max(row["ratio"] for row in rows),
        "offline_per_s": statistics.median(row["offline_per_s"] for row in rows), "served_per_s": statistics.median(row["served_per_s"] for row in rows),
        **{key: statistics.median(row[key] for row in rows) for key in ("offline_cpu_ms", "server_cpu_ms", "client_cpu_ms", "texts_a_batch", "model_share")},
        "p50_ms": 1000 * float(np.percentile(latencies, 50)), "p95_ms": 1000 * float(np.percentile(latencies, 95)), "grown_mb": grown / 1e6, "exit_code": code,
        "load": os.getloadavg()[1], "rows": rows,
    }  # fmt: skip
    print(json.dumps({key: value for key, value in summary.items() if key != "rows"}, indent=1))
    if given["out"]:
        Path(given["out"]).write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
