"""A plain sentence per claim of THREAT_MODEL.md: held, not held, not tested.

The rules are stated here, one function each, and decide from what the audit holds: rows of what crossed, findings,
conformance checks, measured epsilons. What no rule speaks of was not tested: an audit with nothing to say of a claim
does not say that it holds. Sentences that the threat model marks as broken, or not claimed, are judged too, under the
words by which it names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from motte.audit.document import ClaimVerdict, Verdict

if TYPE_CHECKING:
    from motte.audit.document import SchemeReport
    from motte.audit.epsilon import EmpiricalEpsilon
    from motte.audit.finding import Finding
    from motte.audit.interface import Check

CLAIMS: Final[Mapping[str, str]] = {
    "A1": "a bundle tells nobody a weight, the graph, labels or preprocessing without a recipient's key",
    "A2": "a bundle that was altered in any byte is refused",
    "A3": "a bundle not signed by the demanded signer is refused",
    "A4": "with --min-release an older bundle is refused",
    "A5": "a file is written whole or not at all",
    "B1": "a grant opens for one worker, bundle and release",
    "B2": "no key crosses the link in clear",
    "B3": "private key files that others can read are refused",
    "B4": "a bundle sealed to a broker is opened by nobody but with the broker's keys",
    "C1": "weights never cross the client's link; inputs and outputs cross it sealed, numbered, in one order",
    "C2": "a malformed frame ends the session",
    "C3": "with --verify a worker is sent nothing but the bundle before its evidence satisfies the policy",
    "C4": "a host that relays the attested channel reads nothing of it and alters nothing unnoticed",
    "D1": "nothing is unpickled; only operations of a closed table run",
    "D2": "the parts answer as the whole model does",
    "D3": "the manifest is the owner's, whoever holds a recipient's key",
    "D4": "a user's own model file runs on the owner's machine only",
    "D5": "a worker on onnxruntime loads what a test lists, and no more",
    "D6": "a lowered program holds no weight",
    "E1": "the worker is not dumpable and sees nothing of the client's environment",
    "E2": "the worker writes no plaintext to any file",
    "E3": "in streamed mode plaintext weights stay within the stated memory",
    "E4": "a worker that was killed or stopped costs one clear error",
    "E5": "a worker of a pool serves one bundle in its life",
    "E6": "opened weights lie in memory that direct reads do not reach, where the kernel has it",
    "E7": "an image for Gramine holds exactly the files of its record",
    "E8": "a worker in a process gives up files and system calls before its first word",
    "E9": "an enclave's script gets what its owner signed, whatever the host's environment says",
    "F1": "what leaves is a closed list: weights, residuals and output gradients of declared layers",
    "F2": "the recording holds exactly what crossed",
    "F3": "the full activation exists inside only",
    "F4": "the first and the last layer stay inside by default",
    "F5": "a weight leaves only where header and plan both say so",
    "F6": "a release happens once",
    "F7": "under noise no sample is above its clip, and all that leaves lies on a grid",
    "F8": "the stated epsilon is an upper bound, and infinite unless everything that leaves is privatised",
    "F9": "a lie above the stated magnitude passes the check with at most the stated probability",
    "F10": "an answer that was not asked for is refused",
    "F11": "nothing crosses a network in the clear",
    "F12": "where every direction of a layer is kept inside, its residual is zero exactly",
    "F13": "what leaves in spite of the scheme is said by layer before it leaves",
    "G1": "sealed data shows no pixel, label, class name or file name",
    "G2": "training on sealed data leaves no plaintext in checkpoints or logs",
    "G3": "an altered, forged or older checkpoint is refused",
    "G4": "entries of a sealed log cannot be changed or left out unseen",
    "G5": "nothing of the test split leaves unless it is asked for",
    "G6": "a run over attested channels starts only with every place of the signed configuration taken once",
    "G7": "under a broker what the owner did not sign of a training is refused before evidence is made",
    "G8": "under a broker no release leaves before it was counted, and none beyond the budget",
    "G9": "under a broker an older checkpoint gets no key, and a crash loses none",
    "G10": "under a broker keys go only to processes that satisfy the policy which the owner signed",
    "H1": "evidence speaks for one nonce, key, certificate and configuration",
    "H2": "SIMULATED evidence passes only where a policy permits it by name",
    "H3": "SGX and TDX quotes count under the vendor's root with collateral in force",
    "H4": "SEV-SNP evidence that is not what the policy asks for is refused",
    "H5": "a GPU's report alone is never accepted",
    "H6": "a TPM's quote counts only by an enrolled key",
    "H7": "the broker gives keys only to the key in evidence that verifies",
    "H8": "key-encryption keys never leave the broker",
    "H9": "no keys below the lowest allowed release, none for what was revoked",
    "H10": "a broker's log that was altered is found by whoever kept a head",
    "H11": "an enclave believes only its own broker's answer to its own question",
    "H12": "a GPU counts as inside only by a verdict about this process's own GPU and guest",
    "H13": "a TPM's key is enrolled only by the answer of the TPM that holds both keys",
    "H14": "the signed terms bind which layers run on a confidential GPU, and which measurements of it are good",
    "H15": "a kind of worker that has no evidence says so",
    "F, broken: training without noise": "without noise a training step gives away what stayed inside",
    "F, broken: labels": "without noise on gradients a training gives labels away, also with the last layer inside",
    "F, not claimed: residuals without noise": "a residual without noise hides the input",
}
"""Every claim in the words of a line; the tests compare the numbers with THREAT_MODEL.md."""
_NEARLY_ALL: Final = 50.0
"""Position in per cent from which the training attack counts as working."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that the rules may look at."""

    schemes: Sequence[SchemeReport] = ()
    findings: Sequence[Finding] = ()
    checks: Sequence[Check] = ()
    epsilons: Sequence[tuple[str, EmpiricalEpsilon]] = ()


Decision = tuple[Verdict, str]
Rule = Callable[[Evidence], Decision | None]
"""None: says nothing."""


def decide(evidence: Evidence) -> tuple[ClaimVerdict, ...]:
    """The verdict on every claim of :data:`CLAIMS`, in its order."""
    return tuple(_one(claim, says, evidence) for claim, says in CLAIMS.items())


def _one(claim: str, says: str, evidence: Evidence) -> ClaimVerdict:
    rules: list[Rule] = [lambda seen: _by_checks(claim, seen)]
    if claim in _RULES:
        rules.append(_RULES[claim])
    decisions = [each for each in (rule(evidence) for rule in rules) if each is not None]
    if not decisions:
        return ClaimVerdict(claim, "not tested", f"Not tested: {says}.")
    verdict: Verdict = "not held" if any(each == "not held" for each, _ in decisions) else "held"
    reasons = "; ".join(reason for each, reason in decisions if each == verdict)
    return ClaimVerdict(claim, verdict, f"{verdict.capitalize()}: {says}. {reasons[:1].upper()}{reasons[1:]}.")


# --- the rules ------------------------------------------------------------------------------------------------------
def _by_checks(claim: str, evidence: Evidence) -> Decision | None:
    """Held where every conformance check of the claim met what the claim promises."""
    mine = [each for each in evidence.checks if each.claim == claim]
    if not mine:
        return None
    failed = [each for each in mine if not each.held]
    if failed:
        named = ", ".join(f"{each.name} ({each.how})" for each in failed[:3])
        return "not held", f"{len(failed)} of {len(mine)} checks failed: {named}"
    count = "one check" if len(mine) == 1 else f"{len(mine)} checks"
    return "held", f"{count} tried it and met what it promises"


def _closed_list(evidence: Evidence) -> Decision | None:
    """Held where only declared layers sent anything, and at inference no gradient left."""
    split = [each for each in evidence.schemes if each.kind == "asymmetric" and each.inference]
    if not split:
        return None
    for scheme in split:
        for phase, rows in (("inference", scheme.inference), ("training", scheme.training)):
            for row in rows:
                if row.layer not in scheme.declared:
                    return "not held", f"under {scheme.audited} a tensor of {row.layer} crossed in {phase}"
                if phase == "inference" and row.kind in ("gradient", "input-gradient", "weight-gradient"):
                    return "not held", f"under {scheme.audited} a gradient of {row.layer} crossed at inference"
    tensors = sum(row.tensors for each in split for row in (*each.inference, *each.training) if row.direction == "sent")
    return "held", f"{tensors} tensors that left were looked at, every one of a declared layer and kind"


def _not_the_whole(evidence: Evidence) -> Decision | None:
    """Held where in every layer, under every asymmetric scheme, what left differs from the activation."""
    found = [
        (scheme.audited, row.layer, row.exposed.aligned)
        for scheme in evidence.schemes
        if scheme.kind == "asymmetric"
        for row in scheme.inference
        if row.exposed is not None
    ]
    if not found:
        return None
    audited, layer, most = max(found, key=lambda each: each[2])
    if most >= 1.0 - 1e-9:
        return "not held", f"under {audited} all of the activation of {layer} left"
    return "held", f"the most of an activation that left was {most:.1%}, of {layer} under {audited}"


def _ends_inside(evidence: Evidence) -> Decision | None:
    """Held where no scheme that leaves the placement to the default sent anything of the first or the last layer."""
    default = [each for each in evidence.schemes if each.kind == "asymmetric" and not each.chosen]
    if not default:
        return None
    for scheme in default:
        for row in (*scheme.inference, *scheme.training):
            if row.layer in (scheme.first, scheme.last):
                return "not held", f"under {scheme.audited} a tensor of {row.layer} crossed"
    ends = {name for each in default for name in (each.first, each.last)}
    return "held", f"nothing of {' and '.join(sorted(ends))} crossed"


def _epsilon_bounds(evidence: Evidence) -> Decision | None:
    """Not held where an attack proves a larger epsilon than is stated; held where it was tried against a finite one."""
    finite = [each for _, each in evidence.epsilons if each.upper != float("inf")]
    broken = [(audited, each) for audited, each in evidence.epsilons if each.contradiction]
    if broken:
        return "not held", "; ".join(f"{audited}: {each}" for audited, each in broken[:3])
    if not finite:
        return None
    closest = max(finite, key=lambda each: each.lower / each.upper if each.upper else 0.0)
    return "held", f"the closest that an attack came: {closest}"


def _training_broken(evidence: Evidence) -> Decision | None:
    """Held (it is as bad as it is said to be) where the weight-delta attack comes near its ceiling without noise."""
    quiet = {each.audited for each in evidence.schemes if each.kind == "asymmetric" and not each.noised}
    found = [
        each
        for each in evidence.findings
        if "weight" in each.attack and "delta" in each.attack and each.audited in quiet
    ]
    powerful = [each for each in found if each.position_percent is not None]
    if not powerful:
        return None
    best = max(powerful, key=lambda each: each.position_percent or 0.0)
    reached = best.position_percent or 0.0
    said = f"{best.attack} at {best.layer or 'all layers'} came to {reached:.0f} % of its ceiling in {best.metric}"
    return ("held" if reached >= _NEARLY_ALL else "not held"), said


def _labels_broken(evidence: Evidence) -> Decision | None:
    """Held (it is as bad as it is said to be) where labels are surely recovered without noise; says nothing where they
    are not: of a trained model few records do not show it."""
    quiet = {each.audited for each in evidence.schemes if each.kind == "asymmetric" and not each.noised}
    found = [each for each in evidence.findings if each.attack.startswith("label") and each.audited in quiet]
    surely = [each for each in found if each.powerful and each.above_floor]
    if not surely:
        return None
    best = max(surely, key=lambda each: each.position_percent or 0.0)
    return "held", f"{best.attack} came to {best.position_percent:.0f} % of its ceiling in {best.metric}"


def _plain_residuals(evidence: Evidence) -> Decision | None:
    """Not held where any reconstruction from a residual without noise is surely better than from nothing."""
    quiet = {each.audited for each in evidence.schemes if each.kind == "asymmetric" and not each.noised}
    found = [each for each in evidence.findings if "reconstruction" in each.attack and each.audited in quiet]
    powerful = [each for each in found if each.powerful]
    if not powerful:
        return None
    better = [each for each in powerful if each.above_floor]
    if not better:
        return "held", f"{len(powerful)} reconstructions were no better than from nothing; stronger ones may be"
    best = max(better, key=lambda each: each.position_percent or 0.0)
    return "not held", (
        f"{best.attack} at {best.layer or 'all layers'} reached {best.metric} {best.scheme.value:.3g} {best.unit}, "
        f"{best.position_percent:.0f} % of the way from nothing ({best.floor.value:.3g}) to everything "
        f"({best.ceiling.value:.3g})"
    )


_RULES: Final[Mapping[str, Rule]] = {
    "F1": _closed_list,
    "F3": _not_the_whole,
    "F4": _ends_inside,
    "F8": _epsilon_bounds,
    "F, broken: training without noise": _training_broken,
    "F, broken: labels": _labels_broken,
    "F, not claimed: residuals without noise": _plain_residuals,
}
