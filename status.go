package main

import (
	"encoding/hex"
	"encoding/json"
	"net/http"
	"strconv"
	"time"
)

// fresh decides whether a read may be answered from this node's own state, and says in
// the answer how old it can be.
func (s *server) fresh(c *call) error {
	stale, err := c.flag("stale")
	if err != nil {
		return err
	}
	age, known := s.node.staleness()
	ms := stalenessMs(age, known)
	c.w.Header()["Confman-Staleness-Ms"] = []string{strconv.FormatInt(ms, 10)}
	if !stale && (!known || ms > int64(s.cfg.Cluster.MaxStaleness)) {
		return errStaleRead.because("this node cannot show that it is at most %d ms behind; read from another node, or with ?stale", s.cfg.Cluster.MaxStaleness)
	}
	c.sawRevision(s.store.at().rev)
	return nil
}

// stalenessMs rounds up, so that it stays a bound; -1 where none is known.
func stalenessMs(age time.Duration, known bool) int64 {
	if !known {
		return -1
	}
	return int64((age + time.Millisecond - 1) / time.Millisecond)
}

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
	Reason      string `json:"reason,omitempty"` // why not ready
}

// ready answers 200 only if a plain read would be answered here and a leader with a quorum
// is known.
func (s *server) ready(c *call) error {
	pos := s.store.at()
	age, known := s.node.staleness()
	r := readiness{
		Status: "ready", Node: s.node.id, Role: s.node.role(), Term: s.node.raft.CurrentTerm(),
		Revision: pos.rev, Hash: hex.EncodeToString(pos.hash[:]), StalenessMs: stalenessMs(age, known),
	}
	r.LeaderID, r.Leader = s.node.leader()
	switch {
	case s.stopping.Load() != serving:
		r.Reason = "shutting down"
	case r.LeaderID == "":
		r.Reason = "no leader is known"
	case !known:
		r.Reason = "how far behind this node is, is not known yet"
	case r.StalenessMs > int64(s.cfg.Cluster.MaxStaleness):
		r.Reason = "too far behind the leader"
	}
	status := http.StatusOK
	if r.Reason != "" {
		r.Status, status = "not-ready", http.StatusServiceUnavailable
		c.w.Header()["Retry-After"] = []string{"1"}
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return c.sendJSON(status, b)
}
