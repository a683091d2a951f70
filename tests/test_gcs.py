"""The backend for Google Cloud Storage on an emulator: the conformance suite, and what goes wrong on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import stores
import torch
from gcs_rig import Answer, Request, Service, says

from ckptstore import Store
from ckptstore.errors import CkptStoreError, InvalidOption, NoAtomicCreate
from ckptstore.protocol import Backend
from ckptstore.testing import BackendConformance

pytest_plugins = ("gcs_fixtures",)


class TestConformance(BackendConformance):
    rounds = 2
    many = 30  # see test_pages
    service: Service

    @pytest.fixture
    def _open_place(self, fake_gcs: Service, tmp_path: Path) -> Iterator[None]:
        self.service, self.location = fake_gcs, fake_gcs.place()
        self.root = self.location.partition("/")[2] + "/"
        self.place = tmp_path
        self.backend = self.make_backend(tmp_path)
        yield
        self.backend.close()

    @pytest.fixture(autouse=True)
    def _opened(self, _open_place: None) -> None:
        """The suite's own fixture opens the backend before it could ask for a server."""

    def make_backend(self, place: Path) -> Backend:
        return self.service.backend(self.location)

    def raw_get(self, key: str) -> bytes | None:
        return self.service.raw_get(self.root + key)

    def raw_put(self, key: str, data: bytes) -> None:
        self.service.raw_put(self.root + key, data)

    def raw_keys(self) -> Sequence[str]:
        return self.service.raw_keys(self.root)


# -- a whole store


def test_resume_and_remote_checksums(fake_gcs: Service) -> None:
    url = fake_gcs.url()
    with Store(url, owner="a") as store:
        made = store.save({"w": torch.arange(2_000_000.0)}, step=7)
    state = {"w": torch.zeros(2_000_000)}
    with Store(url, owner="b") as store:
        found = store.resume(state)
        assert found is not None and found.step == 7
        assert torch.equal(state["w"], torch.arange(2_000_000.0))
        (name,) = [key for key in fake_gcs.raw_keys("") if made.id in key and key.endswith("state.pt")]
        whole = fake_gcs.raw_get(name)
        assert whole is not None
        fake_gcs.raw_put(name, whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
        damage, _ = store.checkpoint("latest").verify_remote()
        assert [d.path for d in damage] == ["state.pt"]


def test_sixteen_save_at_once_and_none_loses(fake_gcs: Service) -> None:
    url = fake_gcs.url(keep_last="all")
    with Store(url, owner="one") as first:
        first.acquire()

    def save(i: int) -> str:
        with Store(url, acquire=False) as store:
            return stores.write(store, f"rank-{i}", step=i)

    with ThreadPoolExecutor(16) as pool:
        saved = list(pool.map(save, range(16)))
    with Store(url, acquire=False) as store:
        assert store.names() == {f"rank-{i}": saved[i] for i in range(16)}
        assert store.verify() == []


def test_an_emulator_that_ignores_generations_is_refused(fake_gcs: Service) -> None:
    def ignore(obey: Callable[[], Answer], request: Request) -> Answer:
        request.query.pop("ifGenerationMatch", None)
        return fake_gcs.layer.obey(request)

    with fake_gcs.layer.fated(ignore), Store(fake_gcs.url()) as store, pytest.raises(NoAtomicCreate, match="single_writer=1"):
        stores.write(store)


def test_an_upload_that_is_left_is_cancelled(fake_gcs: Service) -> None:
    with Store(fake_gcs.url()) as store:
        fated = fake_gcs.layer.fated(lambda obey, request: obey())
        with fated as seen, pytest.raises(KeyError), store.transaction() as tx, tx.open("big") as file:
            file.write(bytes(40 << 20))
            raise KeyError
        assert seen["cancel"] == 1
        assert store.names() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bucket": "nowhere"}, "bucket"),
        ({"fate": says(403)}, "permission|role"),
    ],
    ids=["no bucket", "no permission"],
)
def test_bad_input_is_told_in_one_line(fake_gcs: Service, change: dict[str, Any], message: str) -> None:
    url = fake_gcs.url(retry_seconds=0).replace("gs://bucket/", f"gs://{change.get('bucket', 'bucket')}/")
    fated = fake_gcs.layer.fated(lambda obey, request: change.get("fate") or obey())
    with fated, Store(url) as store, pytest.raises(CkptStoreError, match=message) as caught:
        stores.write(store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["token=abc", "anon=2", "endpoint_url=http://user:pass@host", "nonsense=1"])
def test_bad_options_are_refused_and_not_repeated(option: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        Store(f"gs://bucket/run?{option}")
    assert "pass@" not in str(caught.value)
    assert "abc" not in str(caught.value)
