package main

import "github.com/spf13/cobra"

func newUpCmd(a *app) *cobra.Command        { return &cobra.Command{Use: "up"} }
func newDownCmd(a *app) *cobra.Command      { return &cobra.Command{Use: "down"} }
func newSuperviseCmd(a *app) *cobra.Command { return &cobra.Command{Use: "supervise", Hidden: true} }
