"""Two launched processes tokenize a dataset once: the first does it, the second reads what it left in the cache."""

import json
import os

from tests.conftest import DEMO_MODEL, ROOT


def test_the_second_process_reads_the_cache_of_the_first(python, tmp_path):
    rows = [json.dumps({"text": f"Enter HAMLET, number {i}. To be, or not to be."}) for i in range(200)]
    (tmp_path / "plays.jsonl").write_text("\n".join(rows))
    search_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    python(
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0",
        str(ROOT / "tests" / "distributed" / "tokenize_driver.py"), str(tmp_path), "--model", str(DEMO_MODEL),
        "--dataset", "plays.jsonl", "--rank", "8", "--output-dir", "out", "--block-size", "32",
        PYTHONPATH=search_path, ACCELERATE_USE_CPU="true", HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    first, second = (json.loads((tmp_path / f"process-{i}.json").read_text()) for i in range(2))
    assert second["rows"] == []
    assert first["rows"] == [200]
    assert first["tokens"] == second["tokens"] > 2000
