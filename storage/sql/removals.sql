-- What is removed on purpose.

-- name: pruned
SELECT * FROM pruned ORDER BY path;

-- name: insert_pruned
INSERT INTO pruned VALUES ($path, $why, $now, $done) ON CONFLICT DO NOTHING;

-- name: pruned_done
UPDATE pruned SET done = true WHERE path = $path;

-- name: unprune
DELETE FROM pruned WHERE path = $path;

-- name: delete_answers
DELETE FROM predictions WHERE model = $model;

-- name: delete_answers_given
DELETE FROM predictions WHERE exam IN (SELECT hash FROM given);
