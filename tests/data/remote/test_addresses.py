"""Addresses: what is one, how names join it, and no secret in it gets past or into a message."""

import pytest

from fasttrain.config import parse_config
from fasttrain.data.config import DataConfig
from fasttrain.data.remote.addresses import join, refuse_secrets, scheme_of, shown
from fasttrain.data.remote.store import open_files
from fasttrain.errors import UserError


@pytest.mark.parametrize(
    ("place", "scheme"),
    [
        ("data/digits", None),
        ("/data/set:1", None),
        ("HTTP://host/set", "http"),
        ("s3://bucket/set", "s3"),
        ("hf://datasets/me/set@main/x", "hf"),
        ("pipe:cat x", "pipe"),
        ("pipes/x", None),
    ],
)
def test_schemes(place, scheme):
    assert scheme_of(place) == scheme


def test_names_join_before_the_query():
    assert join("http://host/set/", "a.tar") == "http://host/set/a.tar"
    assert join("http://host/set?download=true", "a.tar") == "http://host/set/a.tar?download=true"
    assert join("pipe:", "cat a.tar") == "pipe:cat a.tar"


SECRET = "s3cr3t"
CARRIERS = [
    f"https://me:{SECRET}@host/set",
    f"https://{SECRET}@host/set",
    f"sftp://me:{SECRET}@host/set",
    f"https://host/set?token={SECRET}",
    f"https://host/set?X-Amz-Signature={SECRET}&x=1",
    f"https://host/set?sv=1&sig={SECRET}",
    f"https://host/set?AWSAccessKeyId={SECRET}",
    f"https://host/{{0..9}}.tar?download=1&Authorization={SECRET}",
    f"pipe:curl -H 'Authorization: Bearer {SECRET}' http://host/x",
    f"pipe:curl https://me:{SECRET}@host/x",
    f"pipe:curl 'https://host/x?token={SECRET}'",
    f"pipe:fetch --password {SECRET}",
]


@pytest.mark.parametrize("place", CARRIERS)
def test_a_config_with_a_secret_is_refused_before_it_is_written_anywhere(place, tmp_path):
    raw = {"run_dir": str(tmp_path / "run"), "data": {"train": place, "allow_pipe": True}, "model": "vit-tiny", "training": {}}
    with pytest.raises(UserError, match="netrc") as caught:
        parse_config({**raw, "training": {"steps": 1, "global_batch": 1}}, "config.yaml")
    assert SECRET not in str(caught.value)
    with pytest.raises(UserError, match="netrc"):
        open_files(place, DataConfig.model_construct(train=place, allow_pipe=True))


@pytest.mark.parametrize(
    "place",
    [
        "http://host/set",
        "https://host/set?download=true",
        "sftp://me@host/set",
        "abfs://box@account.dfs.core.windows.net/set",
        "hf://datasets/me/set@refs/x",
        "pipe:curl -sf http://host/x",
        'pipe:curl -H "Authorization: Bearer $TOKEN" http://host/x',
        "a folder?token=1",
    ],
)
def test_plain_addresses_pass(place):
    refuse_secrets(place)


def test_messages_show_no_login_and_no_query():
    text = "https://me:pw@host/a?sig=1&x=2 sent on to http://t@other/b?token=3: refused"
    assert shown(text) == "https://host/a?... sent on to http://other/b?... refused"
