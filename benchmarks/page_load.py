"""The page's functions under load: so many clients at once for so long, each answer compared with the right one.

Starts the page of a model on this machine, asks each question once alone, and then lets the clients ask them again and
again. Prints the median and the 95th percentile of the time of an answer, wrong answers, and how the server's memory
grew from the first to the last third.

python benchmarks/page_load.py --model runs/demo --dataset datasets_scripts/sample --clients 8 --seconds 60
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import psutil

from mimic_el import train

SERVER = """
import sys
from mimic_el.space.app import launch
from mimic_el.space.linking import Settings
launch(Settings(sys.argv[1]), server_name="127.0.0.1", server_port=int(sys.argv[2]), quiet=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="runs/demo", help="a checkpoint with its index")
    parser.add_argument("--dataset", default="datasets_scripts/sample", help="a data set whose test mentions are asked")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--port", type=int, default=7878)
    args = parser.parse_args()
    from gradio_client import Client

    mentions = list(train.load_data(train.DataArguments(dataset_name=args.dataset))[0]["test"])[:64]
    questions = [(one["sentence"], None, one["mention"]) for one in mentions if one["mention"] in one["sentence"]]
    env = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"}
    with subprocess.Popen([sys.executable, "-c", SERVER, args.model, str(args.port)], env=env) as server:
        try:
            address = f"http://127.0.0.1:{args.port}"
            first = _connected(Client, address)
            right = [_ask(first, question) for question in questions]
            times, wrong, memory = _load(Client, address, args, questions, right, psutil.Process(server.pid))
        finally:
            server.terminate()
    third = len(memory) // 3
    before, after = np.median(memory[third : 2 * third]), np.median(memory[-third:])
    print(f"{args.clients} clients, {args.seconds:.0f} s: {len(times)} answers, {wrong} of them wrong")
    print(f"median {np.median(times) * 1e3:.0f} ms, 95th percentile {np.percentile(times, 95) * 1e3:.0f} ms")
    print(f"memory of the server: {before / 2**20:.0f} MB in the second third, {after / 2**20:.0f} MB in the last")


def _connected(client: Any, address: str) -> Any:
    for _ in range(120):
        try:
            return client(address, verbose=False)
        except Exception:  # not up yet
            time.sleep(1)
    raise SystemExit(f"The page did not start at {address}.")


def _ask(client: Any, question: tuple[Any, ...]) -> list[tuple[str, float]]:
    linked = client.predict(*question, 5, api_name="/link")
    return [(one["entity_id"], round(one["score"] or 0.0, 3)) for one in linked[0]["entities"]]


def _load(
    client: Any, address: str, args: argparse.Namespace, questions: list[Any], right: list[Any], server: psutil.Process
) -> tuple[list[float], int, list[int]]:
    times: list[float] = []
    wrong: list[int] = []
    memory: list[int] = []
    end = time.monotonic() + args.seconds

    def ask_on(number: int) -> None:
        own, at = client(address, verbose=False), number * 7
        while time.monotonic() < end:
            place = at % len(questions)
            start = time.perf_counter()
            found = _ask(own, questions[place])
            times.append(time.perf_counter() - start)
            same = [one[0] for one in found] == [one[0] for one in right[place]]
            close = all(abs(one[1] - other[1]) < 0.01 for one, other in zip(found, right[place], strict=True))
            if not (same and close):
                wrong.append(place)
            at += 1

    threads = [threading.Thread(target=ask_on, args=(number,)) for number in range(args.clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append(server.memory_info().rss)
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    return times, len(wrong), memory


if __name__ == "__main__":
    main()
