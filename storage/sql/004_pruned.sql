-- What was removed on purpose, to keep the state small: an audit does not miss it. Written before anything
-- is removed, so that a crash in between leaves nothing half: the next start removes the rest.
CREATE TABLE pruned (
    path   TEXT PRIMARY KEY,                    -- cycles/…, snapshots/<id>, predictions/<model>, mlflow/<version>/…
    why    TEXT NOT NULL,
    "at"   TIMESTAMP NOT NULL,
    done   BOOLEAN NOT NULL                     -- false: MLflow has not been told yet
);
