package main

// Partitions: the nodes reach each other's Raft ports through links, which hold back what
// the test says, in each direction on its own. Clients reach every node all the time.

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A minority is a node that must not acknowledge anything while it is cut off.
type minority struct {
	quit    chan struct{}
	clients sync.WaitGroup
	tried   atomic.Int64
}

// besiege has clients write to n, and to nobody else, until end. Each request begins after
// the cut, so whatever n acknowledges it cannot have shown to a majority.
func besiege(tb testing.TB, n *node, name string) *minority {
	m := &minority{quit: make(chan struct{})}
	for client := range 4 {
		m.clients.Go(func() {
			for i := 0; ; i++ {
				value := fmt.Sprintf("%s-%d-%d", name, client, i)
				a, err := do("PUT", n.url+keyPath("minority", fmt.Sprint(client)), adminKey, `{"value":"`+value+`"}`)
				select {
				case <-m.quit: // the answer may be of after the healing
					return
				default:
				}
				m.tried.Add(1)
				if err == nil && a.status/100 == 2 {
					tb.Errorf("%s, which is in the minority, acknowledged %s: %v", n.id, value, a)
				}
				time.Sleep(5 * time.Millisecond) // the pace of the question
			}
		})
	}
	return m
}

// over says that the partition is about to heal, and end waits for the clients.
func (m *minority) over() { close(m.quit) }
func (m *minority) end()  { m.clients.Wait() }

// TestPartitions cuts roads between three nodes under load.
func TestPartitions(t *testing.T) {
	t.Parallel()
	r := seeded(t)
	c, roads := newLinked(t, 3, "", nil, with("Cluster", "RequestTimeout", 2000))
	c.start()
	load := startLoad(c, 8)
	for round := range rounds(1, 10) {
		for _, p := range []struct {
			name     string
			isolated bool // the leader is: it must be replaced, and acknowledge nothing
			cut      func(leader *node, others []*node, held bool)
		}{
			{"leader alone", true, func(leader *node, _ []*node, held bool) { roads.cut(leader, held) }},
			{"leader mute", true, func(leader *node, others []*node, held bool) {
				for _, n := range others {
					roads.of(leader, n).hold(calls, held)
					roads.of(n, leader).hold(replies, held)
				}
			}},
			{"leader deaf", true, func(leader *node, others []*node, held bool) {
				for _, n := range others {
					roads.of(leader, n).hold(replies, held)
					roads.of(n, leader).hold(calls, held)
				}
			}},
			{"bridge", false, func(leader *node, others []*node, held bool) {
				for _, way := range []int{calls, replies} {
					roads.of(leader, others[0]).hold(way, held)
					roads.of(others[0], leader).hold(way, held)
				}
			}},
		} {
			c.ready()
			load.more(limit(10*time.Second), 20+r.IntN(100))
			leader, others := c.leader(), c.followers()
			if r.IntN(2) == 0 {
				others[0], others[1] = others[1], others[0]
			}
			reachable := others
			if !p.isolated {
				reachable = c.nodes
			}
			start, length := time.Now(), between(r, 1500*time.Millisecond, 3*time.Second)
			p.cut(leader, others, true)
			var m *minority
			if p.isolated {
				m = besiege(t, leader, fmt.Sprintf("%s-%d", p.name[7:], round))
			}
			writable(t, reachable, start, 5*time.Second, p.name+", cut")
			time.Sleep(length - time.Since(start)) // the fault's length
			if m != nil {
				m.over()
			}
			start = time.Now()
			p.cut(leader, others, false)
			writable(t, []*node{c.nodes[rand.IntN(3)], leader, others[0], others[1]}, start, 4*time.Second, p.name+", healed")
			if m != nil {
				m.end()
				t.Logf("%s: %d writes to the minority, none acknowledged", p.name, m.tried.Load())
			}
		}
	}
	prove(load)
	t.Logf("all equal")
}
