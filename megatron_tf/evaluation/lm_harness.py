"""The zero-shot tasks of lm-evaluation-harness, asked of a live model. The harness is loaded only when it is used."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tf.data.losses import Loss, LossFinder
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.errors import UserError
from megatron_tf.evaluation.eval_data import FETCH, TASK_FOLDER
from megatron_tf.evaluation.scoring import Ask


def check_installed() -> None:
    """UserError when the harness is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: needs lm_eval, which is not installed. Install it with `pip install -e '.[eval]'`.")


def local_tasks(folder: Path) -> set[str]:
    """The tasks whose files `tools/fetch_eval_data.py` has written into `folder`."""
    return {path.stem for path in folder.glob("*.yaml")} if folder.is_dir() else set()


def run_tasks(
    ask: Ask, tokenizer: Tokenizer, max_length: int, names: Sequence[str], folder: Path, limit: int | None
) -> dict[str, Any]:
    """The harness's own results, as values for JSON, and `lost`: what the tokenizer loses of the requests, in words.

    `ask`: the model.  `max_length`: tokens that it reads at once.  `folder`: of task files, which come before the stock
    tasks of the same name.  `limit`: documents of each task; None: all.
    UserError for an unknown task, one whose data cannot be had, and one that wants text generated.
    """
    if not folder.is_dir() and folder != TASK_FOLDER:
        raise UserError(f"--task-folder {folder}: there is no such folder. `{FETCH}` writes one.")
    all_local = set(names) <= local_tasks(folder)
    if all_local:  # these libraries ask the network whether their files are the newest
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    for library in ("lm_eval", "datasets", "huggingface_hub"):  # the last says each of its retries without a network
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    model = live_model(ask, tokenizer, max_length)
    try:
        # To index the thousands of stock files takes as long as to score a few hundred documents.
        manager = TaskManager(include_path=str(folder) if folder.is_dir() else None, include_defaults=not all_local)
        _check_known(names, manager.all_tasks, folder)
        results = simple_evaluate(model, tasks=list(names), task_manager=manager, limit=limit, log_samples=False)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"--tasks {','.join(names)}: the data cannot be loaded ({type(error).__name__}: {_first_line(error)}). "
            f"The six tasks of the paper need no network after `{FETCH}`; others are downloaded."
        ) from error
    return {**_plain(results, handle_non_serializable), "lost": str(model.lost) if model.lost else None}


def _check_known(names: Sequence[str], known: Sequence[str], folder: Path) -> None:
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    if broken := [name for name in unknown if name in local_tasks(folder)]:
        raise UserError(
            f"{folder / broken[0]}.yaml: cannot be used: it names a file of the harness that is not there, or is damaged. "
            f"Write it anew with `{FETCH}`."
        )
    near = {name: difflib.get_close_matches(name, known, 2) for name in unknown}
    hints = [name + (f" (did you mean {' or '.join(found)}?)" if found else "") for name, found in near.items()]
    local = ", ".join(sorted(local_tasks(folder)))
    raise UserError(
        f"--tasks: unknown: {', '.join(hints)}. "
        + (f"In {folder} there are {local}. " if local else f"`{FETCH}` writes the six of the paper. ")
        + "`lm_eval ls tasks` lists all others."
    )


def live_model(ask: Ask, tokenizer: Tokenizer, max_length: int) -> Any:
    """The model as the harness sees one."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    losses = LossFinder(tokenizer)

    class LiveModel(TemplateLM):
        lost = Loss()

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eod_id

        @property
        def tokenizer_name(self) -> str:
            return tokenizer.fingerprint

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            ids = tokenizer.encode_arrays([string])[0]
            self.lost.add(losses.find(string, [ids]))
            return ids.tolist()

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return ask([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Log-likelihood of whole texts, in windows side by side."""
            windows: list[tuple[list[int], list[int]]] = []
            sizes = []
            for text in (request.args[0] for request in requests):
                rolling = get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, max_seq_len=max_length, context_len=1
                )
                own = [make_disjoint_window(window) for window in rolling]
                windows += own
                sizes.append(len(own))
            answers = iter(ask(windows))
            return [sum(next(answers)[0] for _ in range(size)) for size in sizes]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise UserError(
                "--tasks: one of them wants text generated, which is not done on a live model. Export the model and run "
                "`lm_eval --model hf` on it."
            )

    return LiveModel()


def _plain(values: Any, convert: Any) -> Any:
    """Values as JSON has them; `convert` turns what it does not know."""
    if isinstance(values, dict):
        return {str(key): _plain(value, convert) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_plain(value, convert) for value in values]
    if values is None or isinstance(values, (str, bool, int)):
        return values
    if isinstance(values, float):
        return values if values == values and abs(values) != float("inf") else None
    return _plain(convert(values), convert)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
