"""The Triton adapter: tensors in, answers out, errors to codes. All else is in `nv_embed`, which knows no Triton.

A request is not answered in `execute`. Its response sender is kept and used when its embeddings are ready, so that
the texts of any number of requests share a forward pass although Triton itself merges none.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import locale
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import c_python_backend_utils
import numpy as np
import triton_python_backend_utils as pb_utils
from nv_embed.compute.host import keep_few_products
from nv_embed.errors import (
    Cancelled,
    ComputeFailed,
    ConfigError,
    InvalidRequest,
    RequestError,
    StartupError,
    Unavailable,
)
from nv_embed.metrics import SERIES, Labels, Metric, Update
from nv_embed.model_info import model_info
from nv_embed.models.fingerprint import fingerprint
from nv_embed.requests import OUTPUTS, EmbedRequest, Instructions, RequestLimits
from nv_embed.scheduling.answers import LARGE_ANSWER_BYTES, Answer, Outcome
from nv_embed.scheduling.batcher import Batcher
from nv_embed.scheduling.pace import MIN_BATCH_TOKENS
from nv_embed.scheduling.policy import BatchLimits, most_small_batches
from nv_embed.settings import Settings, variables_of
from nv_embed.shared_memory import SharedMemory
from nv_embed.watchdog import DRAIN_SECONDS, Watchdog, shared_memory

logger = logging.getLogger("nv_embed")


class TritonPythonModel:
    """The entry points that Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load and warm up; an exception here ends the server with its message."""
        self._name = args["model_name"]
        _log_to_triton(self._name)
        # A crash inside a library prints the stack of its thread into the server's log. Those of others change while
        # they are printed, which has ended the printing before it came to the one that matters.
        faulthandler.enable(all_threads=False)
        # Without a locale, Triton's Python reads files as ASCII. Torch's compiler reads its own, which are not ASCII.
        with suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
        self._models = [path.name for path in Path(args["model_repository"]).parent.iterdir()]  # that one may name
        self._watchdog = Watchdog(self._name)
        try:
            config = json.loads(args["model_config"])
            self._load(config.get("parameters", {}))
        except BaseException:
            self._watchdog.stop()
            raise
        self._outputs = frozenset(output["name"] for output in config["output"])
        if missing := OUTPUTS - self._outputs:
            logger.warning(
                "expected the outputs %s in config.pbtxt; got an older file, so requests for them are refused; add "
                "the model anew with tools/add_model, or copy the outputs from nv-embed-v2/config.pbtxt",
                ", ".join(sorted(missing)),
            )
        self._watchdog.start_beating()
        self._drains = Thread(target=self._drain_when_stopping, name="nv-embed-drain", daemon=True)
        self._drains.start()

    def _drain_when_stopping(self) -> None:
        """Triton calls `finalize` only when all is answered, but stops the hard way after its exit timeout."""
        if self._watchdog.wait_for_stop():
            num_unanswered = self._batcher.num_unanswered
            self._batcher.drain(DRAIN_SECONDS)
            # Not through Triton's log, which ends too. If nothing is unanswered and this takes long, Triton waits.
            print(f"{self._name}: the server stops; requests not yet answered: {num_unanswered}", file=sys.stderr)

    def _load(self, parameters: dict[str, dict[str, str]]) -> None:
        keep_few_products()
        # Here, because they import torch, and Triton also imports this file only to look at it.
        from nv_embed.compute.loading import load_engines
        from nv_embed.compute.warm_up import SAMPLE_TEXT, warm_up
        from nv_embed.models import kind_of, read_checkpoint

        try:
            config = Settings.from_parameters(
                {name: value["string_value"] for name, value in parameters.items()},
                variables_of(self._name, os.environ, self._models),
            )
            folder = _in_ascii(config.model_path)
            checkpoint = read_checkpoint(folder)
            config = config.for_longest_text(checkpoint.longest_text)
            if config.query_prompt is None:
                config = replace(config, query_prompt=checkpoint.query_instruction)
            if config.document_prompt is None:
                config = replace(config, document_prompt=checkpoint.document_instruction)
            assert config.query_prompt is not None
            assert config.document_prompt is not None
            self._instructions = Instructions(config.query_prompt, config.document_prompt)
            assert config.max_sequence_tokens
            tokenizer = checkpoint.tokenizer(folder, config.max_sequence_tokens)
            for kind, prompt in (("query", config.query_prompt), ("document", config.document_prompt)):
                try:
                    tokenizer.encode([SAMPLE_TEXT], prompt)
                except InvalidRequest as error:
                    raise ConfigError(
                        f"{kind}_prompt, or max_sequence_tokens: no {kind} could be embedded: {error}"
                    ) from None
            engines = load_engines(
                folder, checkpoint, devices=config.device, dtype=config.dtype, attention=config.attention,
                compile_layers=config.compile, max_sequence_tokens=config.max_sequence_tokens,
            )  # fmt: skip
            target_seconds = config.target_batch_milliseconds / 1000
            (sample,) = tokenizer.encode([SAMPLE_TEXT], "")
            measured = min(
                warm_up(engine, sample, target_seconds, MIN_BATCH_TOKENS, config.max_batch_tokens)
                for engine in dict.fromkeys(engines)
            )
            self._model_info = model_info(
                replace(config, dtype=",".join(dict.fromkeys(engine.dtype for engine in engines))),
                name=self._name,
                kind=kind_of(folder),
                fingerprint=fingerprint(folder),  # now, because the files are in memory after loading
                dimension=checkpoint.dimension,
                pooling=checkpoint.pooling,
            )
        except (StartupError, OSError) as error:  # OSError: such as a file that this user may not read
            raise pb_utils.TritonModelException(f"the server does not start: {error}") from None
        self._request_limits = RequestLimits(config.max_request_documents, config.max_request_bytes)
        batch_limits = BatchLimits(
            max_batch_tokens=config.max_batch_tokens or measured,
            most_small_batches=most_small_batches([engine.device.type for engine in engines]),
            target_batch_seconds=None if config.max_batch_tokens else target_seconds,
            max_queue_tokens=config.max_queue_tokens,
            max_queue_bytes=config.max_queue_bytes,
            max_queue_texts=config.max_queue_texts,
            max_queue_seconds=config.max_queue_milliseconds / 1000,
            query_weight=config.query_weight,
            cache_bytes=config.cache_mebibytes * 2**20,
        )
        self._batcher = Batcher(
            tokenizer,
            engines,
            batch_limits,
            on_fatal=self._watchdog.ask_for_restart,
            publish=TritonMetrics(self._name).publish,
        )
        logger.info("ready: %s, %s", config, batch_limits)

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand every request to the batcher. Returning None tells Triton that the answers come later."""
        for request in requests:
            reply = TritonReply(request)
            try:
                embed_request = EmbedRequest.parse(
                    query=_elements(request, "query"),
                    documents=_elements(request, "documents"),
                    parameters=json.loads(request.parameters() or "{}"),
                    limits=self._request_limits,
                    instructions=self._instructions,
                    timeout_seconds=request.timeout() / 1e6,
                )
                embed_request.check_outputs(reply.output_names, self._outputs)
            except RequestError as error:
                self._batcher.refuse(reply, error)
            except Exception:  # what leaves execute would show the client our file path and line
                logger.exception("reading a request failed")
                self._batcher.refuse(reply, ComputeFailed("reading this request failed; the server's log says why"))
            else:
                if embed_request.model_info:
                    reply.model_info = self._model_info
                if reply.wants_vectors:
                    self._batcher.submit(embed_request, reply)
                else:
                    self._batcher.answer_without_vectors(reply)

    def is_ready(self) -> bool:
        """What Triton asks, from release 26.03 on, before it calls the model and itself ready."""
        return self._batcher.is_accepting

    def finalize(self) -> None:
        """Triton has drained its requests by now; end the threads."""
        self._batcher.stop()
        self._watchdog.stop()
        self._drains.join(1.0)
        # Replies live in memory shared with the server. That is gone when the interpreter ends, and to collect them
        # then is a segmentation fault.
        del self._batcher
        gc.collect()


class TritonReply:
    """The response sender of one request. Touching it after the final answer would crash the whole server."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self.output_names = frozenset(request.requested_output_names())  # all if the client names none
        self._lock = Lock()
        self.model_info: bytes | None = None  # sent if the client names this output, or no outputs

    @property
    def wants_vectors(self) -> bool:
        """Whether anything has to be computed for it."""
        return self.model_info is None or self.output_names != {"model_info"}

    def is_cancelled(self) -> bool:
        """Whether the client hung up, cancelled or ran out of time."""
        with self._lock:
            return self._sender is None or bool(self._sender.is_cancelled())

    def send(self, outcome: Outcome) -> Outcome:
        """Answer, once; returns what was sent."""
        if isinstance(outcome, Answer) and outcome.num_bytes > LARGE_ANSWER_BYTES:
            outcome = _shared_memory().refusal(outcome.num_bytes) or outcome
        response = self._response(outcome)
        with self._lock:
            sender, self._sender = self._sender, None
            assert sender is not None, "a request was answered twice"
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return outcome

    def _response(self, outcome: Outcome) -> Any:
        if isinstance(outcome, RequestError):
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(outcome), _code(outcome)))
        outputs: dict[str, Callable[[], Any]] = {
            outcome.embedding_type.output: outcome.embeddings,
            "token_counts": lambda: np.array(outcome.token_counts, dtype=np.int32),
        }
        if outcome.is_truncated is not None:
            outputs["is_truncated"] = lambda: np.array(outcome.is_truncated, dtype=np.bool_)
        if self.model_info is not None:
            outputs["model_info"] = lambda: np.array([self.model_info], dtype=np.object_)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array()) for name, array in outputs.items() if name in self.output_names]
        )


def _shared_memory() -> SharedMemory:
    """As it is now."""
    outside = os.statvfs("/dev/shm")
    regions = (path for path in shared_memory(os.getpid()) if path.exists())  # somebody may have cleaned /dev/shm up
    return SharedMemory(
        region_bytes=sum(path.stat().st_size for path in regions),
        region_free_bytes=c_python_backend_utils.shared_memory.free_memory(),
        outside_free_bytes=outside.f_bavail * outside.f_frsize,
    )


def _kept(metric: Any) -> Any:
    """The same, never deleted: Triton deletes by name what other instances still use, and the server crashes."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(metric))
    return metric


class TritonMetrics:
    """The table of metrics as Triton's own, on its metrics port. A label tells models apart."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        kinds = {
            "counter": pb_utils.MetricFamily.COUNTER,
            "gauge": pb_utils.MetricFamily.GAUGE,
            "histogram": pb_utils.MetricFamily.HISTOGRAM,
        }
        self._families = {
            metric: _kept(pb_utils.MetricFamily(metric.metric_name, metric.description, kinds[metric.kind]))
            for metric in Metric
        }
        self._series: dict[tuple[Metric, Labels], Any] = {}
        for metric, labels in SERIES:
            self._one(metric, labels)

    def publish(self, update: Update) -> None:
        """Pass it on."""
        series = self._one(update.metric, update.labels)
        change = {"counter": series.increment, "gauge": series.set, "histogram": series.observe}
        change[update.metric.kind](update.value)

    def _one(self, metric: Metric, labels: Labels = ()) -> Any:
        """The series of a metric with these labels, made when first asked for."""
        if (metric, labels) not in self._series:
            buckets = {"buckets": list(metric.buckets)} if metric.buckets else {}
            named = {"model": self._model_name, **dict(labels)}
            self._series[metric, labels] = _kept(self._families[metric].Metric(labels=named, **buckets))
        return self._series[metric, labels]


def _in_ascii(path: str) -> Path:
    """A folder under a name that Triton's Python understands, which takes all names for ASCII."""
    if path.isascii():
        return Path(path)
    try:
        return Path(f"/proc/self/fd/{os.open(path.encode(), os.O_PATH)}")
    except OSError:  # the name is better in a message
        return Path(path)


def _code(error: RequestError) -> Any:
    match error:
        case InvalidRequest():
            return pb_utils.TritonError.INVALID_ARG
        case Unavailable():
            return pb_utils.TritonError.UNAVAILABLE
        case Cancelled():
            return pb_utils.TritonError.CANCELLED
        case _:
            return pb_utils.TritonError.INTERNAL


def _elements(request: Any, name: str) -> list[bytes] | None:
    """The elements of an input, None when it is absent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else list(tensor.as_numpy().reshape(-1))


class _TritonHandler(logging.Handler):
    """Passes log records on to Triton's own log."""

    def emit(self, record: logging.LogRecord) -> None:
        log = pb_utils.Logger.log_info
        if record.levelno >= logging.ERROR:
            log = pb_utils.Logger.log_error
        elif record.levelno >= logging.WARNING:
            log = pb_utils.Logger.log_warn
        log(self.format(record))


def _log_to_triton(model_name: str) -> None:
    for stream in (sys.stdout, sys.stderr):  # Triton's stub leaves them in ASCII, whatever the locale says
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    handler = _TritonHandler()
    handler.setFormatter(logging.Formatter(model_name.replace("%", "%%") + ": %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
