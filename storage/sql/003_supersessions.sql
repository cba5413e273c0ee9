-- A question may get another answer, so its key is no longer unique. DuckDB cannot drop a constraint: the
-- table is made again. Its rows are still never updated and never deleted.
CREATE TABLE rows_again (
    hash         TEXT PRIMARY KEY,              -- whole labeled content
    key          TEXT NOT NULL,                 -- task + context + question
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
INSERT INTO rows_again BY NAME SELECT * FROM rows ORDER BY seq;
DROP TABLE rows;
ALTER TABLE rows_again RENAME TO rows;

-- Which row of which source gives a stored row's label. By the newest `seq` of a source's id and a question
-- one knows what that id says now, so that reading it once more is no news.
CREATE TABLE labels (
    row_hash   TEXT NOT NULL,
    source     TEXT NOT NULL,
    id         TEXT NOT NULL,                   -- (row_hash, source, id) is unique
    created_at TIMESTAMP,                       -- the newest time it was given with
    seq        BIGINT NOT NULL                  -- order in which labels were news
);
INSERT INTO labels SELECT hash, source, id, created_at, seq FROM rows;

-- Rows that lost their place to another answer, and rows that have it back. Append-only.
CREATE TABLE supersessions (
    seq      BIGINT PRIMARY KEY,
    row_hash TEXT NOT NULL,
    by_hash  TEXT,                              -- the row that took its place; NULL: it counts again
    "at"     TIMESTAMP NOT NULL
);
CREATE VIEW superseded AS
SELECT * FROM supersessions
QUALIFY seq = max(seq) OVER (PARTITION BY row_hash) AND by_hash IS NOT NULL;

-- The rows that count.
CREATE VIEW standing AS SELECT * FROM rows ANTI JOIN superseded ON superseded.row_hash = rows.hash;

-- Rows that a lineage of cycles was taught in a role, and that no answer which is superseded by now was
-- taught over since.
CREATE MACRO learned(which, lineage) AS TABLE
WITH taught AS (
    SELECT rows.hash, rows.key, max(cycle_rows.cycle_id) AS cycle_id
    FROM cycle_rows JOIN rows ON rows.hash = cycle_rows.row_hash
    WHERE cycle_rows.role = which AND cycle_rows.cycle_id IN (SELECT unnest(lineage::BIGINT[]))
    GROUP BY rows.hash, rows.key
), outdated AS (
    SELECT taught.key, taught.cycle_id FROM taught JOIN superseded ON superseded.row_hash = taught.hash
)
SELECT taught.hash FROM taught
ANTI JOIN outdated ON outdated.key = taught.key AND outdated.cycle_id >= taught.cycle_id;
