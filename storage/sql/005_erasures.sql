-- Rows that had to be forgotten. What is left of one is its hash, so that the next pull does not take it in again.
CREATE TABLE erasures (
    id       BIGINT PRIMARY KEY,
    who      TEXT NOT NULL,
    why      TEXT NOT NULL,
    "at"     TIMESTAMP NOT NULL,
    rebuild  BOOLEAN NOT NULL,                  -- whether the champion had learned one of them
    done_at  TIMESTAMP                          -- NULL: begun; the next start goes on with it
);
CREATE TABLE erased (hash TEXT PRIMARY KEY, erasure BIGINT NOT NULL);   -- of a row, or of a quarantined one

-- Versions that learned one of them, or grew out of one that did: they never serve again.
CREATE TABLE tainted (version INTEGER PRIMARY KEY, erasure BIGINT NOT NULL);

-- A champion may also move by an erasure. DuckDB cannot change a constraint: the table is made again.
CREATE TABLE promotions_again (
    seq      BIGINT PRIMARY KEY,
    version  INTEGER,                           -- NULL: back to the bare base
    previous INTEGER,
    cycle_id BIGINT,                            -- set when a passing verdict promoted it
    kind     TEXT NOT NULL CHECK (kind IN ('gate', 'manual', 'rollback', 'erasure')),
    who      TEXT NOT NULL,
    why      TEXT NOT NULL,
    "at"       TIMESTAMP NOT NULL
);
INSERT INTO promotions_again BY NAME SELECT * FROM promotions ORDER BY seq;
DROP TABLE promotions;
ALTER TABLE promotions_again RENAME TO promotions;
