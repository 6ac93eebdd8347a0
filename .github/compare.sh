#!/usr/bin/env bash
# What a branch changes: run the pipeline, and compare with the branch that it is for. The workflow
# pull_request.yml beside this does it for each pull request; here: .github/compare.sh origin/main
set -euo pipefail
base=$(git rev-parse --short "$(git merge-base "${1:-origin/main}" HEAD)")
folder=metrics/page
[[ -z $(dvc remote list) ]] || dvc pull --allow-missing # what was computed before is not run again
dvc repro
dvc plots diff --quiet "$base"
{
    dvc metrics diff --md "$base"
    printf '\n```text\n'
    # Which images changed; without a remote, the predictions of the other branch are missing here.
    python -m stages compare "$base" --picture "$folder/changed.png" 2>&1 || true
    printf '```\n'
} >"$folder/summary.md"
cat "$folder/summary.md"
