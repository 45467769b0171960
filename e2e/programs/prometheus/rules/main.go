// Which alerts fire over given series, by Prometheus' own engine. Upstream's promtool can test rules too, but links the
// service discovery of all clouds and takes minutes to build.
//
// It reads one case from stdin as JSON, and prints the labels of the alerts that fire, as JSON by their names.
package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
)

// How often rules are evaluated.
const interval = time.Minute

type input struct {
	// The file with the rules.
	Rules string `json:"rules"`
	// Series, as the tests of Prometheus write them.
	Load string `json:"load"`
	// When the alerts are asked for, seconds after the beginning of the series.
	At int64 `json:"at"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	var in input
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
		return fmt.Errorf("read the case: %w", err)
	}
	content, err := os.ReadFile(in.Rules)
	if err != nil {
		return err
	}
	// It refuses unknown fields, and templates that cannot be expanded.
	rules, errs := rulefmt.Parse(content, false, model.LegacyValidation, parser.NewParser(parser.Options{}), slog.Default())
	if len(errs) > 0 {
		return fmt.Errorf("%s: %v", in.Rules, errs)
	}
	loader, err := promqltest.NewLazyLoader(in.Load, promqltest.LazyLoaderOpts{EnableAtModifier: true, EnableNegativeOffset: true})
	if err != nil {
		return fmt.Errorf("load the series: %w", err)
	}
	defer loader.Close()
	at := time.Unix(in.At, 0).UTC()
	loader.WithSamplesTill(at, func(e error) { err = e })
	if err != nil {
		return fmt.Errorf("load the series: %w", err)
	}
	fire := map[string][]map[string]string{}
	for _, group := range rules.Groups {
		for _, rule := range group.Rules {
			firing, err := firing(loader, rule, at)
			if err != nil {
				return fmt.Errorf("alert %s: %w", rule.Alert, err)
			}
			if len(firing) > 0 {
				fire[rule.Alert] = firing
			}
		}
	}
	return json.NewEncoder(os.Stdout).Encode(fire)
}

// The label sets that the rule's expression has had at each evaluation for as long as the rule wants.
func firing(loader *promqltest.LazyLoader, rule rulefmt.Rule, at time.Time) ([]map[string]string, error) {
	evaluations := int(time.Duration(rule.For)/interval) + 1
	seen := map[string]int{}
	var last promql.Vector
	for n := evaluations - 1; n >= 0; n-- {
		query, err := loader.QueryEngine().NewInstantQuery(loader.Context(), loader.Queryable(), nil, rule.Expr, at.Add(-time.Duration(n)*interval))
		if err != nil {
			return nil, err
		}
		result := query.Exec(loader.Context())
		if result.Err != nil {
			return nil, result.Err
		}
		if last, err = result.Vector(); err != nil {
			return nil, err
		}
		for _, sample := range last {
			seen[sample.Metric.String()]++
		}
	}
	var firing []map[string]string
	for _, sample := range last {
		if seen[sample.Metric.String()] == evaluations {
			firing = append(firing, sample.Metric.Map())
		}
	}
	return firing, nil
}
