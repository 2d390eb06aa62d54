package network

import (
	"net"
	"testing"

	"github.com/cayhq/cay"
)

// BenchmarkSlot makes slots one after the other. They go at the end: the kernel
// takes namespaces away in its own time.
func BenchmarkSlot(b *testing.B) {
	p := testPool(b, "bench")
	for b.Loop() {
		acquire(b, p, true)
	}
}

// BenchmarkSlots makes two slots at once.
func BenchmarkSlots(b *testing.B) {
	p := testPool(b, "bench")
	b.SetParallelism(1)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			acquire(b, p, true)
		}
	})
}

func BenchmarkRelease(b *testing.B) {
	p := testPool(b, "bench")
	for b.Loop() {
		b.StopTimer()
		s := acquire(b, p, true)
		b.StartTimer()
		if err := p.Release(b.Context(), s.Index); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPolicy(b *testing.B) {
	p := testPool(b, "bench")
	for b.Loop() {
		b.StopTimer()
		s := acquire(b, p, true)
		b.StartTimer()
		if err := p.SetPolicy(b.Context(), s.Index, closed); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := p.Release(b.Context(), s.Index); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkConnect opens connections from a slot, so that what a policy adds to
// one can be told: open, with two lists of ten thousand ranges, and turned over
// to a listener in the router.
func BenchmarkConnect(b *testing.B) {
	p := testPool(b, "bench", func(p *Pool) { p.Limits = Limits{Connections: 1 << 20, PerSecond: 1 << 20} })
	serve(b, world, publicAddr.String()+":80")
	for name, e := range map[string]cay.Egress{"open": {}, "20000 ranges": large(10_000), "diverted": named} {
		b.Run(name, func(b *testing.B) {
			s, err := p.Acquire(b.Context(), e)
			if err != nil {
				b.Fatal(err)
			}
			defer func() {
				if err := p.Release(b.Context(), s.Index); err != nil {
					b.Error(err)
				}
			}()
			if e.Named() {
				d, err := p.Divert(b.Context(), s.Index)
				if err != nil {
					b.Fatal(err)
				}
				defer d.Close()
				go func() {
					for {
						c, err := d.TCP.Accept()
						if err != nil {
							return
						}
						c.Close()
					}
				}()
			}
			err = in(b, s.NetNS, func() error {
				for b.Loop() {
					c, err := net.Dial("tcp4", publicAddr.String()+":80")
					if err != nil {
						return err
					}
					c.(*net.TCPConn).SetLinger(0)
					c.Close()
				}
				return nil
			})
			if err != nil {
				b.Fatal(err)
			}
		})
	}
}

func BenchmarkLargePolicy(b *testing.B) {
	p := testPool(b, "bench")
	s := acquire(b, p, true)
	e := large(10_000)
	for b.Loop() {
		if err := p.SetPolicy(b.Context(), s.Index, e); err != nil {
			b.Fatal(err)
		}
	}
}
