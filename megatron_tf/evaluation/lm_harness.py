"""Zero-shot tasks of lm-evaluation-harness, run on a model in memory. The harness is imported only when it is used."""

from __future__ import annotations

import difflib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from megatron_tf.caches import prepare_hugging_face
from megatron_tf.data.losses import Loss, LossFinder
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.errors import UserError, first_line, shortened, shown
from megatron_tf.evaluation.eval_data import FETCH, TASK_FOLDER
from megatron_tf.evaluation.scoring import Answer, Ask, Request
from megatron_tf.streams import without_terminal

REASON_LIMIT = 200  # characters


def check_installed() -> None:
    """UserError when the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: needs lm_eval, which is not installed. Install it with `pip install -e '.[eval]'`.")


def local_tasks(folder: Path) -> set[str]:
    """The names of the tasks whose files `tools/fetch_eval_data.py` has written into `folder`."""
    return {path.stem for path in folder.glob("*.yaml")} if folder.is_dir() else set()


def run_tasks(
    ask: Ask, tokenizer: Tokenizer, max_length: int, names: Sequence[str], folder: Path, limit: int | None
) -> dict[str, Any]:
    """Loads the tasks and runs them: see `HarnessTasks` and `HarnessTasks.run`."""
    return HarnessTasks(tokenizer, max_length, names, folder, limit).run(ask)


class HarnessTasks:
    """Loaded tasks with their data. All of them can be scored: they were rehearsed with a dummy model."""

    def __init__(
        self, tokenizer: Tokenizer, max_length: int, names: Sequence[str], folder: Path, limit: int | None
    ) -> None:
        """`max_length`: most tokens that the model reads at once.  `folder`: a folder of task files, which are used
        instead of stock tasks of the same name.  `limit`: documents of each task; None: all.

        UserError for a task that is unknown, whose data cannot be loaded, or that cannot be scored: it needs generated
        text, images or a missing package, or its documents do not have the expected form.
        """
        if not folder.is_dir() and folder != TASK_FOLDER:
            raise UserError(f"--task-folder {folder}: there is no such folder. `{FETCH}` writes one.")
        all_local = set(names) <= local_tasks(folder)
        if all_local:  # otherwise these libraries ask the network whether their files are the newest
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        prepare_hugging_face()
        import datasets
        from lm_eval.tasks import TaskManager

        for library in (
            "lm_eval",
            "datasets",
            "huggingface_hub",
        ):  # without a network, huggingface_hub would log each of its retries
            logging.getLogger(library).setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._names = list(names)
        self._limit = limit
        with _loading_errors(",".join(names)):
            include = str(folder) if folder.is_dir() else None
            # Indexing the thousands of stock files takes as long as scoring a few hundred documents.
            self._manager: Any = TaskManager(include_path=include, include_defaults=not all_local)
            _check_known(names, self._manager.all_tasks, folder)
        self._loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in self._names:
            with _loading_errors(name):
                self._add(name, self._manager.load([name]))
        self._rehearse()

    def run(self, ask: Ask) -> dict[str, Any]:
        """Scores the tasks with the model behind `ask`; returns the harness's own results as JSON values.

        The key `lost` is added: what the tokenizer loses of the requests, in words; None when it loses nothing.
        """
        from lm_eval import simple_evaluate
        from lm_eval.utils import handle_non_serializable

        model = live_model(ask, self._tokenizer, self._max_length)
        self._manager.load = lambda names: self._loaded
        results = simple_evaluate(
            model, tasks=self._names, task_manager=self._manager, limit=self._limit, log_samples=False
        )
        return {**_plain(results, handle_non_serializable), "lost": str(model.lost) if model.lost else None}

    def _add(self, name: str, loaded: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds `loaded`, the task or the group of tasks called `name`. UserError when one of them is there already."""
        if twice := sorted(self._loaded["tasks"].keys() & loaded["tasks"].keys()):
            raise UserError(f"--tasks: {twice[0]} is named twice, the second time by {name}. Name it once.")
        for kind, entries in self._loaded.items():
            entries.update(loaded[kind])

    def _rehearse(self) -> None:
        """Do everything but ask the model. Otherwise a task that cannot be scored would show only after hours."""
        from lm_eval.evaluator import evaluate

        model = live_model(_know_nothing, self._tokenizer, self._max_length)
        generating, problems = [], []
        for name, task in self._loaded["tasks"].items():
            alone = {"tasks": {name: task}, "groups": {}, "group_map": {}}
            try:
                # Hide the progress of the rehearsal, and warnings that only concern the dummy model's answers.
                with redirect_stderr(io.StringIO()), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    evaluate(model, alone, limit=self._limit, bootstrap_iters=0, log_samples=False)
            except _WantsTextError:
                generating.append(name)
            except UserError as error:
                problems.append(f"--tasks: {name} {error}")
            except Exception as error:
                kind, reason = type(error).__name__, first_line(error)
                problems.append(f"--tasks: {name} cannot be scored ({kind}: {shortened(reason, REASON_LIMIT)}).")
        if generating:
            some = "one of them wants" if len(generating) == 1 else f"{len(generating)} of them want"
            problems.insert(
                0,
                f"--tasks: {some} text generated, which is not done on a live model: {', '.join(generating)}. Export "
                "the model and run `lm_eval --model hf` on it.",
            )
        if problems:
            raise UserError("\n".join(problems))


class _WantsTextError(Exception):
    pass


def _know_nothing(requests: Sequence[Request]) -> list[Answer]:
    return [(-1.0, False)] * len(requests)


@contextmanager
def _loading_errors(names: str) -> Iterator[None]:
    """Turns errors of the block, in which the tasks `names` are loaded, into UserErrors."""
    import datasets

    try:
        with without_terminal():  # at a terminal, data sets with code of their own ask whether to run it
            yield
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"--tasks {names}: the data cannot be loaded ({type(error).__name__}: {first_line(error)}). "
            f"The six tasks of the paper need no network after `{FETCH}`; others are downloaded."
        ) from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a task's file or its own code may raise anything
        reason = f"{type(error).__name__}: {shortened(first_line(error), REASON_LIMIT)}"
        raise UserError(f"--tasks {names}: cannot be loaded ({reason}).") from error


def _check_known(names: Sequence[str], known: Sequence[str], folder: Path) -> None:
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    if broken := [name for name in unknown if name in local_tasks(folder)]:
        raise UserError(
            f"{folder / broken[0]}.yaml: cannot be used: it names a file of the harness that is not there, or is "
            f"damaged. Write it anew with `{FETCH}`."
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
    """The model behind `ask`, as an object of the harness's interface for models."""
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

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Answer]:
            return ask([self._pair(*request.args) for request in requests])

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[Answer]:
            return ask([(context, continuation) for _, context, continuation in requests])

        def _pair(self, context: str, continuation: str) -> Request:
            """Token ids of context and continuation, neither of them empty. An empty continuation would always have a
            likelihood of 1; UserError for one.

            White space at the end of a context belongs to the continuation. Without a context, the continuation begins
            a document. If the context's last token would contain the continuation, the two are encoded separately.
            """
            asked, answer = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
            if not answer:
                asked, answer = self.tok_encode(context), self.tok_encode(continuation)
            if not answer:
                raise UserError(
                    f"cannot be scored: no token stands for the answer {shown(continuation)} after "
                    f"{shown(context[-60:])}."
                )
            if not asked and answer[0] == self.prefix_token_id and len(answer) > 1:
                return answer[:1], answer[1:]  # the text itself begins with the token that begins a document
            return asked or [self.prefix_token_id], answer

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Log-likelihood in nats of whole texts, each read in adjacent windows that do not overlap."""
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
            raise _WantsTextError

    return LiveModel()


def _plain(values: Any, convert: Any) -> Any:
    """`values` as JSON values. None for numbers that are not finite; `convert` is called for unknown types."""
    if isinstance(values, dict):
        return {str(key): _plain(value, convert) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_plain(value, convert) for value in values]
    if values is None or isinstance(values, (str, bool, int)):
        return values
    if isinstance(values, float):
        return values if values == values and abs(values) != float("inf") else None
    return _plain(convert(values), convert)
