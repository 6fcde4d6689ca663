"""vLLM's real scheduler and connector calls around a model whose KV says what it was computed from.

The "KV" of a token is a digest of the KV of the token before it, read from the pages, and the token itself: a
page that holds anything but what belongs there changes every token after it, and so the answer. Answers are
compared with :func:`expected_answer`, which knows nothing of pages.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MLAAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from kvstrata.integrations.vllm.connector import KVStrataConnector

VOCABULARY = 50_000
NUM_LAYERS = 2
VALUE_BYTES = 8


def token_value(before: bytes, token: int, layer: int, rank: int) -> bytes:
    """The KV of one token in one layer of one rank."""
    return hashlib.sha256(before + token.to_bytes(4, "little") + bytes([layer, rank])).digest()[:VALUE_BYTES]


def next_token(values: list[bytes]) -> int:
    """What the model says after a token with that KV in the last layer of all ranks."""
    return int.from_bytes(hashlib.sha256(b"".join(values)).digest(), "little") % VOCABULARY


def expected_answer(prompt: list[int], num_tokens: int, *, num_ranks: int = 1) -> list[int]:
    """The right answer."""
    values = [b""] * num_ranks

    def read(token: int) -> None:
        values[:] = [token_value(value, token, NUM_LAYERS - 1, rank) for rank, value in enumerate(values)]

    for token in prompt:
        read(token)
    answer = []
    for _ in range(num_tokens):
        answer.append(next_token(values))
        read(answer[-1])
    return answer


def model_folder(folder: Path) -> Path:
    """A model's configuration without weights."""
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": NUM_LAYERS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Layer:
    """What the connector asks an attention layer."""

    isa = "sim"

    @staticmethod
    def get_attn_backend():
        return Layer

    @staticmethod
    def get_name():
        return "CPU_ATTN"


class Engine:
    """An engine core with simulated workers, one per tensor-parallel rank."""

    def __init__(
        self,
        folder: Path,
        *,
        num_blocks: int = 64,
        block_size: int = 16,
        max_num_batched_tokens: int = 64,
        max_num_seqs: int = 8,
        prefix_caching: bool = True,
        overlap: bool = False,
        kv_role: str = "kv_both",
        num_ranks: int = 1,
        mla: bool = False,
        spec_class: type = FullAttentionSpec,
        spec_arguments: dict | None = None,
        extra_config: dict | None = None,
    ) -> None:
        self.block_size = block_size
        self.overlap = overlap
        transfer = KVTransferConfig(
            kv_connector="KVStrataConnector",
            kv_connector_module_path="kvstrata.integrations.vllm",
            kv_role=kv_role,
            kv_connector_extra_config=extra_config or {},
        )
        scheduler = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=4096,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
        )
        self.config = VllmConfig(
            model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", seed=0),
            scheduler_config=scheduler,
            cache_config=CacheConfig(block_size=block_size, enable_prefix_caching=prefix_caching),
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=transfer,
        )
        self.config.cache_config.block_size = block_size
        # The CPU platform turns it off; the scheduler itself runs with it on any device.
        self.config.scheduler_config.async_scheduling = overlap
        self.config.cache_config.num_gpu_blocks = num_blocks
        names = [f"model.layers.{layer}.self_attn.attn" for layer in range(NUM_LAYERS)]
        parallel = self.config.parallel_config
        parallel.tensor_parallel_size = parallel.world_size = num_ranks
        spec = (MLAAttentionSpec if mla else spec_class)(
            block_size=block_size,
            num_kv_heads=1,
            head_size=VALUE_BYTES,
            head_size_v=0,
            dtype=torch.uint8,
            **(spec_arguments or {}),
        )
        self.same_kv = mla
        self.kv_cache_config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(names, spec)])
        self.config.compilation_config.static_forward_context.update(dict.fromkeys(names, Layer))
        self.workers: list[KVStrataConnector] = []
        self.pages: list[list[np.ndarray]] = []
        """By rank and layer."""
        with set_current_vllm_config(self.config):
            for rank in range(num_ranks):
                self._start_worker(rank, names, num_blocks)
            scheduler_class = AsyncScheduler if overlap else Scheduler
            self.scheduler = scheduler_class(
                vllm_config=self.config,
                kv_cache_config=self.kv_cache_config,
                structured_output_manager=StructuredOutputManager(self.config),
                block_size=block_size,
                log_stats=True,
            )
        self.connector = self.scheduler.connector
        self._aggregator = KVOutputAggregator.from_connector(self.connector, num_ranks)
        handshakes = {(0, rank): worker.get_handshake_metadata() for rank, worker in enumerate(self.workers)}
        if None not in handshakes.values():
            self.connector.set_xfer_handshake_metadata_pp_aware(handshakes)
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(block_size, sha256)
        self._tables: dict[str, list[int]] = {}
        self._in_flight: deque = deque()
        self.requests: dict[str, Request] = {}
        self.num_computed = 0
        """Tokens that the model computed."""

    def _start_worker(self, rank: int, names: list[str], num_blocks: int) -> None:
        group = SimpleNamespace(rank_in_group=rank)
        with mock.patch.multiple(
            parallel_state,
            get_tp_group=lambda: group,
            get_pp_group=lambda: SimpleNamespace(rank_in_group=0),
        ):
            worker = KVStrataConnector(self.config, KVConnectorRole.WORKER, self.kv_cache_config)
        shape = (num_blocks, 1, self.block_size, VALUE_BYTES)
        tensors = {name: torch.zeros(shape, dtype=torch.uint8) for name in names}
        worker.register_kv_caches(tensors)
        self.workers.append(worker)
        self.pages.append([tensor.squeeze(1).numpy() for tensor in tensors.values()])

    def add(self, request_id: str, prompt: list[int], max_tokens: int = 1, **arguments) -> Request:
        """Send a request. ``arguments``: ``cache_salt``, ``lora_request``, ``params`` (kv_transfer_params)."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
        if transfer := arguments.pop("params", None):
            params.extra_args = {"kv_transfer_params": transfer}
        if arguments.pop("prompt_logprobs", False):
            params.skip_reading_prefix_cache = True
        request = Request(request_id, list(prompt), params, None, block_hasher=self._hasher, **arguments)
        self.requests[request_id] = request
        self.scheduler.add_request(request)
        return request

    def abort(self, request_id: str) -> None:
        """The client went away."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """One iteration of the engine core: schedule, run, and process output; with overlap one step late."""
        output = self.scheduler.schedule()
        self._in_flight.append((output, self._run(output)))
        if not self.overlap or len(self._in_flight) > 1:
            self._process()

    def _process(self) -> None:
        output, result = self._in_flight.popleft()
        self.scheduler.update_from_output(output, result)

    def run(self, max_steps: int = 2000) -> None:
        """Step until there is nothing left to do."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished_requests():
                break
            self.step()
        else:
            raise AssertionError("requests do not finish")
        while self._in_flight:
            self._process()
        # What the last requests gave back reaches the connector with one more step.
        self.step()
        while self._in_flight:
            self._process()

    def ask(self, request_id: str, prompt: list[int], max_tokens: int = 1, **arguments) -> list[int]:
        """Send a request and return its answer."""
        request = self.add(request_id, prompt, max_tokens, **arguments)
        self.run()
        return list(request.output_token_ids)

    def _run(self, output) -> ModelRunnerOutput:
        """What a model runner does with one step."""
        for data in output.scheduled_new_reqs:
            self._tables[data.req_id] = list(data.block_ids[0])
        cached = output.scheduled_cached_reqs
        for request_id, new_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                self._tables[request_id] = list(new_ids[0])
            elif new_ids is not None:
                self._tables[request_id] += new_ids[0]
        starts = {data.req_id: data.num_computed_tokens for data in output.scheduled_new_reqs}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        results = [self._run_rank(rank, output, starts) for rank in range(len(self.workers))]
        ids = list(output.num_scheduled_tokens)
        sampled = [
            self._sample(request_id, starts[request_id] + output.num_scheduled_tokens[request_id])
            for request_id in ids
        ]
        self.num_computed += output.total_num_scheduled_tokens
        return self._aggregator.aggregate(
            [
                ModelRunnerOutput(
                    req_ids=ids,
                    req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
                    sampled_token_ids=sampled,
                    kv_connector_output=result,
                )
                for result in results
            ]
        )

    def _run_rank(self, rank: int, output, starts: dict[str, int]):
        kv_transfer_state._KV_CONNECTOR_AGENT = self.workers[rank]
        self.workers[rank].handle_preemptions(output.kv_connector_metadata)
        try:
            if not output.total_num_scheduled_tokens:
                result = KVConnectorModelRunnerMixin.kv_connector_no_forward(output, self.config)
                return result.kv_connector_output
            with (
                set_forward_context(None, self.config),
                KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(output) as connector_output,
            ):
                for request_id, count in output.num_scheduled_tokens.items():
                    self._forward(rank, request_id, starts[request_id], count)
            return connector_output
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = None

    def _forward(self, rank: int, request_id: str, start: int, count: int) -> None:
        """Compute ``count`` tokens of one request on one rank."""
        tokens = self._tokens(request_id)
        for layer in range(NUM_LAYERS):
            for position in range(start, start + count):
                before = self._value(rank, layer, request_id, position - 1) if position else b""
                value = token_value(before, tokens[position], layer, 0 if self.same_kv else rank)
                block = self._tables[request_id][position // self.block_size]
                self.pages[rank][layer][block, position % self.block_size] = list(value)

    def _value(self, rank: int, layer: int, request_id: str, position: int) -> bytes:
        block = self._tables[request_id][position // self.block_size]
        return self.pages[rank][layer][block, position % self.block_size].tobytes()

    def _sample(self, request_id: str, end: int) -> list[int]:
        """The sampled token when the sequence's end has been computed."""
        if end < len(self._tokens(request_id)):
            return []
        ranks = range(1 if self.same_kv else len(self.workers))
        return [next_token([self._value(rank, NUM_LAYERS - 1, request_id, end - 1) for rank in ranks])]

    def _tokens(self, request_id: str) -> list[int]:
        # With overlap the last token may be one that the model sampled and the scheduler has not seen yet.
        return list(self.requests[request_id].all_token_ids) + self._unseen(request_id)

    def _unseen(self, request_id: str) -> list[int]:
        request = self.requests[request_id]
        if request.num_output_placeholders == 0 and request.num_stale_output_tokens == 0:
            return []
        unseen = []
        for _, result in self._in_flight:
            index = result.req_id_to_index.get(request_id)
            if index is not None:
                unseen += result.sampled_token_ids[index]
        return unseen

    def close(self) -> None:
        """Shut down as vLLM does."""
        self.scheduler.shutdown()
        for worker in self.workers:
            worker.shutdown()
