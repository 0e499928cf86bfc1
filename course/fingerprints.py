"""What known wrong answers give at the probes of visible checks: the data of `mmlearn.feedback`.

`mmlearn/fingerprints.json` holds values and sentences, never an answer's code. It is committed, and
worked out again only for an exercise whose text has changed: another machine may round the last
digit of a value differently, and a rebuild there must be no diff.
"""

import hashlib
import json

from course.attempts import job_for, run_jobs
from course.source import CourseError

FINGERPRINTS = "mmlearn/fingerprints.json"
_FORMAT = 1  # raise it when mmlearn.feedback.fingerprint gives other values


def fingerprint_bytes(weeks, names, path, fresh=False):
    """The new content of the fingerprint file: the given weeks brought up to date.

    Other weeks keep theirs, if they are among the `names` of weeks that exist. With `fresh` all of
    the given weeks are worked out again.
    """
    known = read_fingerprints(path)
    digests = {f"{w.name}/{name}": digest_of(w, name) for w in weeks for name in w.exercises}
    current = {k for k, d in digests.items() if known["sources"].get(k) == d and not fresh}
    given = {week.name for week in weeks}
    others = {k for k in known["sources"] if k.split("/")[0] in set(names) - given}
    keep = current | others
    sources = {key: known["sources"][key] for key in keep}
    probes = {p: v for p, v in known["probes"].items() if p.rsplit("/", 1)[0] in keep}
    for key, recorded in record_wrong_answers(weeks, digests.keys() - current).items():
        sources[key] = digests[key]
        probes.update(recorded)
    return _to_bytes(probes, sources)


def record_wrong_answers(weeks, keys):
    """What the wrong answers of exercises give at the probes of their visible checks.

    Returns, for each "week/exercise" key, {probe: [{"value": fingerprint, "says": sentence}]}. A
    value that changes with the random seed cannot be recognised and is left out.
    """
    jobs, says = [], {}
    for week in weeks:
        for exercise in week.exercises.values():
            key = f"{week.name}/{exercise.name}"
            if key in keys:
                answers = [(wrong.name, wrong.cell.line, wrong.code) for wrong in exercise.wrongs]
                jobs.append(job_for(week, exercise, answers, record=True))
                says.update({(key, wrong.name): wrong.says for wrong in exercise.wrongs})
    found = {}
    for result in run_jobs(jobs):
        key = result["key"]
        found[key] = probes = {}
        if "died" in result:
            raise CourseError(f"The cells above the exercise {key} {result['died']}: mend them.")
        for name, (first, *others) in result["answers"].items():
            for probe, value in first.get("records", {}).items():
                if all(other.get("records", {}).get(probe) == value for other in others):
                    mistake = {"value": value, "says": says[key, name]}
                    probes.setdefault(probe, []).append(mistake)
    return found


def read_fingerprints(path):
    """The file's content; nothing, if there is no file or it is damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return {"probes": dict(content["probes"]), "sources": dict(content["sources"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"probes": {}, "sources": {}}


def digest_of(week, name):
    """A digest of everything that an exercise's fingerprints are made from."""
    exercise = week.exercises[name]
    parts = [_FORMAT, *(cell.text for cell in week.given_before(name))]
    parts += [check.visible for check in exercise.checks]
    parts += [part for wrong in exercise.wrongs for part in (wrong.name, wrong.says, wrong.code)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _to_bytes(probes, sources):
    """JSON with a line per mistake, so that a diff shows which one changed."""

    def line(value):
        return json.dumps(value, ensure_ascii=False)

    lists = [
        f"  {line(probe)}: [\n   " + ",\n   ".join(line(m) for m in mistakes) + "\n  ]"
        for probe, mistakes in sorted(probes.items())
    ]
    pairs = [f"  {line(key)}: {line(digest)}" for key, digest in sorted(sources.items())]
    lines = ["{", ' "probes": {', ",\n".join(lists), " },"]
    lines += [' "sources": {', ",\n".join(pairs), " }", "}", ""]
    return "\n".join(lines).encode()
