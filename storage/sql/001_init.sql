-- The daemon's own store. Times are UTC. No foreign keys: DuckDB checks them eagerly on update,
-- and every writer is in storage/store.py. No sequences: the one writer numbers its lines itself
-- (highest + 1), so that numbers have no gaps after a rollback or a crash.

CREATE TABLE schema_migrations (version INTEGER PRIMARY KEY, applied_at TIMESTAMP NOT NULL);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);

-- Accepted rows: never updated, never deleted.
CREATE TABLE rows (
    hash         TEXT PRIMARY KEY,              -- whole labeled content
    key          TEXT NOT NULL UNIQUE,          -- task + context + question: one answer each
    question_key TEXT NOT NULL,                 -- context + question: one split each
    seq          BIGINT NOT NULL,               -- order of acceptance, from 1
    id           TEXT NOT NULL,                 -- the collector's
    task         TEXT NOT NULL,
    question     TEXT NOT NULL,
    answer       TEXT NOT NULL,
    context      TEXT NOT NULL,
    created_at   TIMESTAMP,
    split        TEXT NOT NULL CHECK (split IN ('train', 'validation', 'suite')),
    source       TEXT NOT NULL,
    accepted_at  TIMESTAMP NOT NULL
);

-- Rows that were not accepted, each with its reason. A re-delivery of the same bad row changes nothing.
CREATE TABLE quarantine (
    hash      TEXT PRIMARY KEY,                 -- of the raw content and the reason
    id        TEXT,
    task      TEXT,
    raw       TEXT NOT NULL,                    -- JSON of the fields as delivered
    reason    TEXT NOT NULL,                    -- short code
    detail    TEXT NOT NULL,
    source    TEXT NOT NULL,
    "at"        TIMESTAMP NOT NULL
);

-- How far each source has been read.
CREATE TABLE cursors (source TEXT PRIMARY KEY, watermark TIMESTAMP, full_scan_at TIMESTAMP, pulled_at TIMESTAMP);

CREATE TABLE tasks (
    name       TEXT PRIMARY KEY,
    kind       TEXT NOT NULL,
    metric     TEXT NOT NULL,
    origin     TEXT NOT NULL,                   -- inferred | config
    labels     TEXT NOT NULL,                   -- JSON array, sorted
    created_at TIMESTAMP NOT NULL
);

-- A frozen suite never changes; growth is a new version.
CREATE TABLE suites (
    task      TEXT NOT NULL,
    version   INTEGER NOT NULL,
    hash      TEXT NOT NULL,
    size      INTEGER NOT NULL,
    frozen_at TIMESTAMP NOT NULL,
    cycle_id  BIGINT NOT NULL,
    PRIMARY KEY (task, version)
);
CREATE TABLE suite_rows (task TEXT NOT NULL, version INTEGER NOT NULL, row_hash TEXT NOT NULL,
    PRIMARY KEY (task, version, row_hash));

CREATE TABLE cycles (
    id           BIGINT PRIMARY KEY,
    state        TEXT NOT NULL,
    trigger      TEXT NOT NULL,                 -- schedule | manual | ...
    requested_by TEXT NOT NULL,
    requested_at TIMESTAMP NOT NULL,
    started_at   TIMESTAMP,
    finished_at  TIMESTAMP,
    parent       INTEGER,                       -- model version that it continued from; NULL: the base
    snapshot     TEXT,
    version      INTEGER,                       -- model version that it made
    reason       TEXT,                          -- why it ended as it did, in words
    attempts     INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE cycle_rows (cycle_id BIGINT NOT NULL, row_hash TEXT NOT NULL, role TEXT NOT NULL,
    PRIMARY KEY (cycle_id, row_hash));          -- role: train | validation | replay

-- Model versions: what each was made of. The version number is the registry's.
CREATE TABLE models (
    version      INTEGER PRIMARY KEY,
    cycle_id     BIGINT NOT NULL UNIQUE,
    parent       INTEGER,
    result       TEXT NOT NULL,                 -- result directory of the training, relative to the state directory
    adapter_hash TEXT NOT NULL,
    base         TEXT NOT NULL,                 -- fingerprint
    created_at   TIMESTAMP NOT NULL
);

CREATE TABLE verdicts (
    cycle_id   BIGINT PRIMARY KEY,
    passed     BOOLEAN NOT NULL,
    verdict    TEXT NOT NULL,                   -- JSON of the whole verdict: reasons, thresholds, suites
    decided_at TIMESTAMP NOT NULL
);

-- The history of `champion`: the last line is the champion. Append-only.
CREATE TABLE promotions (
    seq      BIGINT PRIMARY KEY,
    version  INTEGER,                           -- NULL: rolled back to the bare base
    previous INTEGER,
    cycle_id BIGINT,                            -- set when a passing verdict promoted it
    kind     TEXT NOT NULL CHECK (kind IN ('gate', 'manual', 'rollback')),
    who      TEXT NOT NULL,
    why      TEXT NOT NULL,
    "at"       TIMESTAMP NOT NULL
);

-- What a model answered. `model` is an adapter hash or `base:<fingerprint>`; `exam` identifies the
-- suite version, the label set and the decoding, so equal pairs need never be asked twice.
CREATE TABLE predictions (
    model       TEXT NOT NULL,
    exam        TEXT NOT NULL,
    row_hash    TEXT NOT NULL,
    prediction  TEXT NOT NULL,
    exact_match DOUBLE NOT NULL,
    token_f1    DOUBLE NOT NULL,
    score       DOUBLE NOT NULL,
    PRIMARY KEY (model, exam, row_hash)
);
-- The accuracy matrix and the evidence of each verdict: one line a cycle, model and task.
CREATE TABLE scores (
    cycle_id BIGINT NOT NULL,
    label    TEXT NOT NULL,                     -- base | champion | candidate
    task     TEXT NOT NULL,
    version  INTEGER NOT NULL,                  -- of the suite
    model    TEXT NOT NULL,
    exam     TEXT NOT NULL,
    metric   TEXT NOT NULL,
    score    DOUBLE NOT NULL,
    size     INTEGER NOT NULL,
    PRIMARY KEY (cycle_id, label, task)
);

CREATE TABLE events (
    seq      BIGINT PRIMARY KEY,
    "at"       TIMESTAMP NOT NULL,
    kind     TEXT NOT NULL,
    cycle_id BIGINT,
    detail   TEXT NOT NULL                      -- JSON
);
