"""SSH identities, certificates, connections and confined file service."""
