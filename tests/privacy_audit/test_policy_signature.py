"""Signed policies: a demanded signature is checked against the very numbers, and no file makes the parser crash."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pixcell_core.contracts import canonical_bytes, digest
from pixcell_core.errors import PixcellError
from pixcell_core.trust.dsse import Envelope, sign_envelope
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import read_entries
from privacy_audit import commands
from privacy_audit.policy import SHIPPED, Policy, PolicyError, load_policy, parse_policy
from privacy_audit.policy_signature import (
    POLICY_TYPE,
    differences,
    require_signed,
    sign_policy,
    signed_policy,
)

KEY = SigningKey.generate()
CORE = (SHIPPED / "core.yaml").read_text()


def refused(policy: Policy, source: Path, key: SigningKey = KEY) -> str:
    with pytest.raises(PixcellError) as caught:
        require_signed(policy, source, key.verify_key)
    assert caught.value.exit_code == 1
    return caught.value.code


def test_a_signed_policy_is_accepted_and_its_comments_may_change(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(CORE)
    envelope = sign_policy(load_policy(path), KEY)
    (tmp_path / "own.yaml.dsse").write_bytes(envelope.to_bytes())
    require_signed(load_policy(path), path, KEY.verify_key)
    path.write_text("# mended\n" + CORE)
    require_signed(load_policy(path), path, KEY.verify_key)
    assert signed_policy(envelope, KEY.verify_key) == load_policy("core")


def test_every_missing_or_false_signature_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(CORE)
    assert refused(load_policy(path), path) == "policy-unsigned"
    beside = tmp_path / "own.yaml.dsse"
    beside.write_bytes(sign_policy(load_policy(path), KEY).to_bytes())
    assert refused(load_policy(path), path, SigningKey.generate()) == "policy-signers-missing"
    path.write_text(CORE.replace("flag_p: 0.001", "flag_p: 0.002"))
    assert refused(load_policy(path), path) == "policy-differs"
    path.write_text(CORE)
    beside.write_bytes(sign_envelope("application/other", b"{}", [KEY]).to_bytes())
    assert refused(load_policy(path), path) == "wrong-payload-type"
    beside.write_bytes(b"{}")
    assert refused(load_policy(path), path) == "bad-envelope"


def test_two_parties_sign_one_policy_and_no_other(tmp_path: Path) -> None:
    other = SigningKey.generate()
    both = sign_policy(load_policy("core"), other, sign_policy(load_policy("core"), KEY))
    assert set(both.key_ids) == {KEY.key_id, other.key_id}
    with pytest.raises(PixcellError) as caught:
        sign_policy(load_policy("rehearsal"), KEY, both)
    assert caught.value.code == "policy-differs"
    with pytest.raises(PixcellError):
        signed_policy(sign_envelope(POLICY_TYPE, b"[]", [KEY]), KEY.verify_key)


def test_k_of_n_keys_each_counted_once_and_each_refusal_named(tmp_path: Path) -> None:
    hospital, auditor, officer = (SigningKey.generate() for _ in range(3))
    three = [key.verify_key for key in (hospital, auditor, officer)]
    path, beside = tmp_path / "own.yaml", tmp_path / "own.yaml.dsse"
    path.write_text(CORE)
    policy = load_policy(path)
    one = sign_policy(policy, hospital)
    two = sign_policy(policy, auditor, one)
    beside.write_bytes(one.to_bytes())
    assert require_signed(policy, path, *three, needed=1) == (hospital.verify_key,)
    cases: list[tuple[list[Any], int | None, str]] = [
        (three, 2, "policy-signers-missing"),
        (three, None, "policy-signers-missing"),  # without a number all must have signed
        ([three[0]] * 3, 2, "policy-threshold"),  # one key three times is one key
        (three, 4, "policy-threshold"),
        (three, 0, "policy-threshold"),
        ([], None, "policy-threshold"),
    ]
    for keys, needed, code in cases:
        with pytest.raises(PixcellError) as caught:
            require_signed(policy, path, *keys, needed=needed)
        assert caught.value.code == code and caught.value.hint, (needed, code)
    beside.write_bytes(two.to_bytes())
    assert len(require_signed(policy, path, *three, needed=2)) == 2
    # The right key id over a signature of someone else counts for nothing, and is called false.
    forged = json.loads(sign_policy(policy, SigningKey.generate(), one).to_bytes())
    for signature in forged["signatures"]:
        if signature["keyid"] != hospital.key_id:
            signature["keyid"] = auditor.key_id
    forged["signatures"].sort(key=lambda signature: signature["keyid"])
    beside.write_bytes(canonical_bytes(forged))
    with pytest.raises(PixcellError, match="a false one") as caught:
        require_signed(policy, path, *three[:2])
    assert caught.value.code == "policy-signers-missing" and auditor.key_id in caught.value.message


def test_differences_name_every_changed_number_and_no_other() -> None:
    core = load_policy("core")
    changed = core.model_copy(update={"copies": core.copies.model_copy(update={"flag_p": 0.002})})
    assert differences(core, changed) == [("copies.flag_p", "0.001", "0.002")]
    assert differences(core, core) == []
    assert {key for key, _, _ in differences(core, load_policy("rehearsal"))} >= {
        "name",
        "self_test.gates.stain",
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
PATHS = [
    (section, key)
    for section, value in load_policy("core").model_dump(mode="json").items()
    for key in (value if isinstance(value, dict) else [None])
]


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(PATHS), value=JSON, drop=st.booleans())
def test_any_value_in_any_place_is_a_policy_or_a_named_error(
    path: tuple[str, str | None], value: Any, drop: bool
) -> None:
    body = load_policy("core").model_dump(mode="json")
    section, key = path
    target = body if key is None else body[section]
    name = section if key is None else key
    if drop:
        target.pop(name)
    else:
        target[name] = value
    try:
        parse_policy(body)
    except PolicyError as error:
        assert error.message and error.hint and error.exit_code == 4


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "ignore")))
def test_any_bytes_are_a_policy_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "policy.yaml"
    path.write_bytes(data)
    with pytest.raises(PolicyError):
        load_policy(path)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]", "1: 2", "? [a]\n: b", "2026-99-99: x", "x: 2026-02-31", "name: !!python/object:os.system x",
        "&a a: *a", "[" * 3000, "a: " + "9" * 5000, "schema_version: audit-policy/v1\nrequired: [dp, dp, nothing]",
        "true: x", "null: x",
    ],
)  # fmt: skip
def test_hostile_yaml_is_a_named_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(PolicyError):
        load_policy(tmp_path / "p.yaml")


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("linkability", "fail_risk", 0.01, "fail_risk"),
        ("membership", "fail_auc", 0.5, "fail_auc"),
        ("patients", "p_review", 0.001, "p_review"),
        ("conditioning", "p_review", 0.001, "p_review"),
        ("cliques", "review_groups", 9, "fail_groups"),
        ("preconditions", "review_patients_below", 5, "review_patients_below"),
    ],
)
def test_limits_out_of_order_are_refused(section: str, key: str, value: float, words: str) -> None:
    body = load_policy("core").model_dump(mode="json")
    body[section][key] = value
    with pytest.raises(PolicyError, match=words):
        parse_policy(body)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_depth_is_refused_before_it_costs_time(tmp_path: Path, opening: str) -> None:
    """Found by fuzzing: the YAML reader's time grows with the square of the depth, up to a second at its own limit."""
    (tmp_path / "p.yaml").write_text(opening * 60_000)
    before = time.process_time()
    with pytest.raises(PolicyError, match=r"nested more than 16 deep|not YAML"):
        load_policy(tmp_path / "p.yaml")
    assert time.process_time() - before < 0.5


def test_a_large_release_is_held_to_one_in_a_thousand() -> None:
    copies = load_policy("core").copies
    assert copies.for_sizes(2999, 10_000).max_flagged_share == copies.max_flagged_share == 0.02
    assert copies.for_sizes(3000, 3000).max_flagged_share == 0.001
    assert copies.for_sizes(3000, 3000).flag_p == copies.large_flag_p < copies.for_sizes(2999, 3000).flag_p
    assert copies.for_sizes(100_000, 2000).max_flagged_share == 0.02


@pytest.fixture
def cli() -> typer.Typer:
    root = typer.Typer()
    root.callback()(lambda: None)
    commands.register(root)
    return root


def call(cli: typer.Typer, *arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["audit", "policy", *map(str, arguments)])


def test_the_commands_sign_verify_and_compare(cli: typer.Typer, tmp_path: Path) -> None:
    KEY.save(tmp_path / "key")
    KEY.verify_key.save(tmp_path / "key.pub")
    own = tmp_path / "own.yaml"
    own.write_text(CORE.replace("flag_p: 0.001", "flag_p: 0.002"))
    signed = call(cli, "sign", own, "--key", tmp_path / "key", "--format", "json")
    assert signed.exit_code == 0, signed.output
    assert json.loads(signed.stdout)["data"]["signers"] == [KEY.key_id]
    signed_envelope = Envelope.load(tmp_path / "own.yaml.dsse")
    (event,) = read_entries(tmp_path / "key.log")
    assert event.kind == "policy.signed" and event.data == {
        "policy": load_policy(own).digest,
        "key": KEY.key_id,
        "envelope": digest(signed_envelope.to_bytes()),
    }
    assert call(cli, "verify", own, "--trust", tmp_path / "key.pub").exit_code == 0
    SigningKey.generate().verify_key.save(tmp_path / "other.pub")
    both = ("--trust", tmp_path / "key.pub", "--trust", tmp_path / "other.pub")
    assert call(cli, "verify", own, *both).exit_code == 1
    assert call(cli, "verify", own, *both, "--threshold", "1").exit_code == 0
    assert call(cli, "verify", own, *both, "--threshold", "3").exit_code == 4
    assert call(cli, "verify", "core", "--trust", tmp_path / "key.pub").exit_code == 1
    assert call(cli, "diff", "core", "core").exit_code == 0
    differ = call(cli, "diff", "core", own)
    assert differ.exit_code == 1 and "copies.flag_p: 0.001 -> 0.002" in differ.stdout
    assert call(cli, "sign", "core", "--key", tmp_path / "key").exit_code == 4  # not into the package


def test_an_audit_refuses_a_policy_without_the_demanded_signature(cli: typer.Typer, tmp_path: Path) -> None:
    KEY.verify_key.save(tmp_path / "key.pub")
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(yaml.safe_load(CORE)))
    options = ["--train", "a", "--holdout", "b", "--synthetic", "c", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(
        cli,
        ["audit", "run", *options, "--policy", str(own), "--require-signed", str(tmp_path / "key.pub"), "--format", "json"],
    )  # fmt: skip
    assert result.exit_code == 1
    assert json.loads(result.stdout)["code"] == "policy-unsigned"
    assert not (tmp_path / "out").exists()
