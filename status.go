package main

import (
	"encoding/hex"
	"encoding/json"
	"net/http"
)

// health answers while the process serves.
func (s *server) health(c *call) error {
	return c.sendJSON(http.StatusOK, []byte(`{"status":"healthy"}`))
}

// A readiness is the answer of /health/ready.
type readiness struct {
	Status      string `json:"status"` // ready or not-ready
	Node        string `json:"node"`
	Role        string `json:"role"`     // leader, follower, candidate or nonvoter
	Leader      string `json:"leader"`   // base URL of the leader's API, empty if unknown
	LeaderID    string `json:"leaderId"` // empty if unknown
	Term        uint64 `json:"term"`
	Revision    uint64 `json:"revision"`
	Hash        string `json:"hash"` // of the newest event, 64 zeros before the first
	StalenessMs int64  `json:"stalenessMs"`
	Transport   string `json:"transport"`        // between nodes: tls or plaintext
	Reason      string `json:"reason,omitempty"` // why not ready
}

// readiness says how the node is. There is no Reason only if a plain read would be answered here and
// a leader with a quorum is known.
func (s *server) readiness() readiness {
	pos := s.store.at()
	r := readiness{
		Status: "ready", Node: s.node.id, Role: s.node.role(), Term: s.node.term(),
		Revision: pos.rev, Hash: hex.EncodeToString(pos.hash[:]), StalenessMs: stalenessMs(s.node.freshSince.Load()),
		Transport: s.node.transport(),
	}
	r.LeaderID, r.Leader = s.node.leader()
	switch {
	case s.stopping.Load() != serving:
		r.Reason = "shutting down"
	case s.node.raft.Load() == nil:
		r.Reason = "starting"
		if why := s.node.waitsFor.Load(); why != nil {
			r.Reason = *why
		}
	case s.node.removed():
		r.Reason = "this node was removed from the cluster; stop it, and to take it back start it with -join and an empty directory and add it again"
	case r.LeaderID == "":
		r.Reason = "no leader is known"
	case r.StalenessMs < 0:
		r.Reason = "how far behind this node is, is not known yet"
	case r.StalenessMs > int64(s.cfg.Cluster.MaxStaleness):
		r.Reason = "too far behind the leader"
	}
	if r.Reason != "" {
		r.Status = "not-ready"
	}
	return r
}

// ready answers 200 if there is no reason against it.
func (s *server) ready(c *call) error {
	r, status := s.readiness(), http.StatusOK
	if r.Reason != "" {
		status = http.StatusServiceUnavailable
		c.w.Header()["Retry-After"] = []string{"1"}
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return c.sendJSON(status, b)
}
