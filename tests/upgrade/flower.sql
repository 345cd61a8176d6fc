-- members.sqlite
BEGIN TRANSACTION;
CREATE TABLE boots (
    name TEXT NOT NULL, boot TEXT NOT NULL, first_seen REAL NOT NULL, last_seen REAL NOT NULL,
    PRIMARY KEY (name, boot)
);
CREATE TABLE events (
    n INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, actor TEXT NOT NULL, what TEXT NOT NULL,
    detail TEXT NOT NULL, times INTEGER NOT NULL DEFAULT 1
, refusal INTEGER NOT NULL DEFAULT 0);
CREATE TABLE invitations (
    token_sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, rotate INTEGER NOT NULL,
    made_at REAL NOT NULL, expires_at REAL NOT NULL, ended_at REAL, end TEXT
, fingerprint TEXT);
CREATE TABLE leaving_nodes (flower_node_id TEXT PRIMARY KEY, name TEXT NOT NULL);
INSERT INTO "leaving_nodes" VALUES('7','bank');
CREATE TABLE members (
    name TEXT PRIMARY KEY, public_key TEXT NOT NULL, fingerprint TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL, flower_node_id TEXT, joined_at REAL NOT NULL,
    data_sha256 TEXT NOT NULL, tokenizer_sha256 TEXT NOT NULL, train_tokens INTEGER NOT NULL,
    photon_version TEXT NOT NULL
);
INSERT INTO "members" VALUES('red','-----BEGIN PUBLIC KEY-----
MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEOf29S2/1IQ3Oc0sFkCjwp4QIYoLgnMF5
Q0JL9CV0LwhurImWaGW/oJ5yefZwi7AXtysd8FsoyrFH/wYLW6Fq9j5BgNaaMH1w
TuHN/xA/ckDIo+kwmmNi5vipN+VPXxeh
-----END PUBLIC KEY-----
','sha256:5cd80d4c67724581dad957dcab48295f74789fb438df183bea35f5eb61c51793','active','18446744073709551615',1800000000.0,'dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd','eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee',5,'0.1.0');
CREATE TABLE presence (name TEXT PRIMARY KEY, seen_at REAL NOT NULL, presence TEXT NOT NULL);
CREATE TABLE retired_keys (
    fingerprint TEXT PRIMARY KEY, name TEXT NOT NULL, retired_at REAL NOT NULL, why TEXT NOT NULL,
    public_key TEXT NOT NULL, data_sha256 TEXT NOT NULL
);
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE tasks (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, silo TEXT NOT NULL,
    kind TEXT NOT NULL, opened_at REAL NOT NULL, until REAL NOT NULL, closed_at REAL,
    most_bytes INTEGER NOT NULL, granted_bytes INTEGER NOT NULL DEFAULT 0,
    readable TEXT NOT NULL, writable TEXT NOT NULL,
    reply BLOB, signature TEXT, fingerprint TEXT
, ask BLOB);
CREATE INDEX open_tasks ON tasks (silo) WHERE closed_at IS NULL;
CREATE INDEX rounds ON tasks (run, round);
DELETE FROM "sqlite_sequence";
COMMIT;
PRAGMA user_version = 4;
