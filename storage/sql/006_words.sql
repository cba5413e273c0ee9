-- What tells near-duplicates: a digest of the words of context and question, in any order. SQL cannot make it:
-- the store does so for rows from before, the next time that it is opened to be written.
ALTER TABLE rows ADD COLUMN words_key TEXT;

-- A view has the columns that its table had when it was made.
CREATE OR REPLACE VIEW standing AS SELECT * FROM rows ANTI JOIN superseded ON superseded.row_hash = rows.hash;
