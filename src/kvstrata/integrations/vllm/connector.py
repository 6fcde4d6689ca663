"""The classes that vLLM loads. They translate its calls; the work is in ``scheduler`` and ``worker``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstrata.client import connect
from kvstrata.client.base import Client
from kvstrata.config import DEFAULT, Resolved, load_settings
from kvstrata.errors import LayoutError
from kvstrata.integrations.vllm.metadata import Handshake, StepMetadata, WorkerReport
from kvstrata.integrations.vllm.namespace import (
    build_namespace,
    common_layout,
    model_fingerprint,
    round_chunk_size,
)
from kvstrata.integrations.vllm.scheduler import SchedulerSide
from kvstrata.integrations.vllm.stats import ConnectorMetrics, ConnectorStats
from kvstrata.integrations.vllm.support import is_mla, kernel_text, page_reader, why_unsupported
from kvstrata.integrations.vllm.worker import WorkerSide
from kvstrata.logs import configure_logging
from kvstrata.tracing import open_tracer
from kvstrata.types import KVLayout, Namespace

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import PromMetric, PromMetricT
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_HIT_SOURCES = {"l1": CacheHitSource.HOST, "disk": CacheHitSource.DISK}


class KVStrataConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Stores and loads the KV cache of full-attention and MLA models.

    vLLM makes one in its scheduler process and one in each worker process. For every other kind of KV cache
    it is inert: vLLM serves as without a connector, and one warning says why.
    """

    default_server_url: ClassVar[str | None] = None
    """The server to use when none is configured; None: a private one (embedded mode)."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        resolved = load_settings(extra_config=transfer.kv_connector_extra_config)
        if resolved.settings.server_url is None and self.default_server_url is not None:
            settings = msgspec.structs.replace(resolved.settings, server_url=self.default_server_url)
            resolved = msgspec.structs.replace(resolved, settings=settings)
        configure_logging(resolved.settings.log_level)
        self._resolved: Resolved = resolved
        self._layouts: dict[tuple[int, int], KVLayout] = {}
        self._handshake: Handshake | None = None
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._refusal = why_unsupported(vllm_config, kv_cache_config)
        self._mla = is_mla(kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            self._start_scheduler()
        elif not self._refusal:
            self._start_worker()

    def _connect(self, name: str, *, map_pool: bool) -> Client:
        engine_id = self._kv_transfer_config.engine_id
        client = connect(self._resolved.settings, name=name, engine_id=engine_id, map_pool=map_pool)
        if not client.connected:
            where = self._resolved.settings.server_url or "the embedded server's address"
            logger.warning("%s: no server at %s yet. Until it is there nothing is cached", name, where)
        return client

    @property
    def _block_size(self) -> int:
        return int(self._kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)

    @property
    def _num_workers(self) -> int:
        return int(self._vllm_config.parallel_config.world_size)

    @property
    def _num_shards(self) -> int:
        """Shards of a chunk: one where every rank holds the same KV."""
        one = self._mla and self._vllm_config.parallel_config.pipeline_parallel_size == 1
        return 1 if one else self._num_workers

    @property
    def requires_kv_delivery(self) -> bool:
        """A store that is dropped is a later miss, nothing more."""
        return False

    # Scheduler process

    def _start_scheduler(self) -> None:
        for notice in self._resolved.notices:
            logger.warning("%s", notice)
        if self._refuse(self._refusal):
            return
        try:
            self._model_fingerprint = model_fingerprint(self._vllm_config.model_config)
        except OSError as error:
            self._refuse(f"the model's weights cannot be told apart from others: {error}")
            return
        transfer = self._kv_transfer_config
        if transfer.kv_load_failure_policy != "recompute":
            # vLLM's default fails the request; it reads the policy right after making its connector.
            transfer.kv_load_failure_policy = "recompute"
            logger.info("kv_load_failure_policy is set to recompute: what cannot be loaded is computed")
        tracer = open_tracer("vllm-scheduler", enabled=self._resolved.settings.tracing)
        self._scheduler = SchedulerSide(
            self._connect("vllm-scheduler", map_pool=False),
            self._resolved.settings,
            self._make_namespace,
            reads=transfer.is_kv_consumer,
            writes=transfer.is_kv_producer,
            num_workers=self._num_workers,
            prefix_caching=bool(self._vllm_config.cache_config.enable_prefix_caching),
            tracer=tracer,
        )

    def _refuse(self, reason: str) -> bool:
        if reason:
            logger.warning(
                "KVStrata caches nothing for this engine: %s. Requests are served without it", reason
            )
        return bool(reason)

    def _make_namespace(self, client: Client) -> Namespace | None:
        if len(self._layouts) != self._num_workers:
            return None
        settings, chunk_size = self._resolved.settings, self._resolved.settings.chunk_size
        if self._resolved.sources["chunk_size"] == DEFAULT and client.server_chunk_size is not None:
            chunk_size = client.server_chunk_size
        namespace = build_namespace(
            self._vllm_config,
            common_layout(self._layouts),
            fingerprint=self._model_fingerprint,
            num_shards=self._num_shards,
            chunk_size=round_chunk_size(chunk_size, self._block_size),
        )
        logger.info(
            "Caching %s: chunks of %d tokens, %d bytes of KV per token and shard, %d shards, %s",
            namespace.model_name,
            namespace.chunk_size,
            namespace.layout.block_bytes // namespace.layout.block_size,
            namespace.world_size,
            settings.server_url or "embedded server",
        )
        return namespace

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """The workers' layouts, by (pp_rank, tp_rank)."""
        if self._scheduler is None:
            return
        handshakes = {rank: data for rank, data in metadata.items() if isinstance(data, Handshake)}
        refusal = next((data.refusal for data in handshakes.values() if data.refusal), "")
        layouts = {rank: data.layout for rank, data in handshakes.items() if data.layout is not None}
        if not refusal and layouts:
            try:
                common_layout(layouts)
            except LayoutError as error:
                refusal = str(error)
        if self._refuse(refusal):
            self._scheduler.close()
            self._scheduler = None
            return
        self._layouts = layouts

    def on_new_request(self, request: Request) -> None:
        """A request has arrived."""
        if self._scheduler is not None:
            self._scheduler.add(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How many tokens beyond vLLM's own hit can be loaded; None: ask again."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """The request has its blocks."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """Where loaded tokens came from. Of a mixed hit, vLLM's own covers the first tier's tokens first."""
        sources: dict[CacheHitSource, int] = {}
        left = num_external_tokens
        tiers: Mapping[str, int] = {}
        if self._scheduler is not None:
            tiers = self._scheduler.hit_tokens_by_tier(request)
        for tier, num_tokens in reversed([*tiers.items()]):
            source = _HIT_SOURCES.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)
            taken = min(left, num_tokens)
            if taken:
                sources[source] = sources.get(source, 0) + taken
            left -= taken
        if left:
            source = CacheHitSource.EXTERNAL_UNSPECIFIED
            sources[source] = sources.get(source, 0) + left
        return sources

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the workers do in this step."""
        if self._scheduler is None:
            return StepMetadata()
        return self._scheduler.plan_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers did."""
        report = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(report, WorkerReport):
            self._scheduler.report(report)

    def request_finished(
        self,
        request: Request,
        block_ids: list[int],  # noqa: ARG002
    ) -> tuple[bool, dict[str, Any] | None]:
        """The request has ended; its blocks may go."""
        if self._scheduler is not None:
            self._scheduler.finish(request)
        return False, None

    def request_finished_all_groups(
        self,
        request: Request,
        block_ids: tuple[list[int], ...],  # noqa: ARG002
    ) -> tuple[bool, dict[str, Any] | None]:
        """As :meth:`request_finished`; its presence lets vLLM start with models that have several groups."""
        return self.request_finished(request, [])

    def reset_cache(self) -> bool | None:
        """Drop what is cached for this engine (``reset_prefix_cache`` with ``reset_connector``)."""
        if self._scheduler is not None:
            self._scheduler.clear()
        return True

    # Worker processes

    def _start_worker(self) -> None:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group  # noqa: PLC0415 (set up by now)

        tp_rank, pp_rank = get_tp_group().rank_in_group, get_pp_group().rank_in_group
        tp_size = self._vllm_config.parallel_config.tensor_parallel_size
        shared = self._num_shards == 1
        name = f"vllm-worker-{pp_rank * tp_size + tp_rank}"
        tracer = open_tracer(name, enabled=self._resolved.settings.tracing)
        self._worker = WorkerSide(
            self._connect(name, map_pool=True),
            shard=0 if shared else pp_rank * tp_size + tp_rank,
            stores=not shared or tp_rank == 0,
            first=tp_rank == 0 and pp_rank == 0,
            tracer=tracer,
        )

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The KV tensors have been allocated."""
        if self._worker is None:
            return
        try:
            layout = self._worker.register(
                kv_caches,
                num_blocks=self._kv_cache_config.num_blocks,
                block_size=self._block_size,
                kernel=kernel_text(self._vllm_config, kv_caches),
                reader=page_reader(self._vllm_config, self._kv_cache_config, kv_caches),
            )
            self._handshake = Handshake(layout)
        except LayoutError as error:
            self._handshake = Handshake(None, str(error))
            self._worker.close()
            self._worker = None

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """This worker's layout, for the scheduler's connector."""
        return self._handshake

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, StepMetadata):
            self._worker.begin_step(connector_metadata)

    def clear_connector_metadata(self) -> None:
        """The step is over."""
        super().clear_connector_metadata()
        if self._worker is not None:
            self._worker.end_step()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:  # noqa: ARG002
        """Load this step's hits."""
        if self._worker is not None:
            self._worker.load()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """A request is scheduled after its load has ended; there is nothing to wait for."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Stores take whole blocks after the forward pass."""

    def wait_for_save(self) -> None:
        """Store this step's chunks."""
        if self._worker is not None:
            self._worker.store()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:  # noqa: ARG002
        """Requests whose loads have ended."""
        if self._worker is None:
            return None, None
        return None, self._worker.take_finished() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be loaded in this step."""
        return self._worker.take_failed_blocks() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Which loads have ended, so that their leases can be let go."""
        return self._worker.take_report() if self._worker is not None else None

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What this worker copied since the last step."""
        moves = None if self._worker is None else self._worker.take_moves()
        return None if moves is None else ConnectorStats.of(moves)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """For vLLM's loggers: the stats with what arrived from the workers."""
        return ConnectorStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """The counters on vLLM's ``/metrics``."""
        return ConnectorMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """vLLM ends."""
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.close()
        self._scheduler = self._worker = None


class LMCacheConnectorV1(KVStrataConnector):
    """The name that users of LMCache's in-process mode have in their configuration."""


class LMCacheConnectorV1Dynamic(LMCacheConnectorV1):
    """The same, as LMCache's own package names it for ``kv_connector_module_path``."""


class LMCacheMPConnector(KVStrataConnector):
    """The name that users of LMCache's server have in their configuration."""

    default_server_url = "tcp://127.0.0.1:5555"
